"""Bytes and regular expressions: GPT-2's tokenizer, with no need of torch."""

from gpt2fast.tokenizer.batch import BatchEncoding
from gpt2fast.tokenizer.legacy import LegacyGPT2Tokenizer
from gpt2fast.tokenizer.stream import StreamDecoder
from gpt2fast.tokenizer.tokenizer import GPT2Tokenizer

__all__ = ["BatchEncoding", "GPT2Tokenizer", "LegacyGPT2Tokenizer", "StreamDecoder"]
