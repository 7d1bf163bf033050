"""Bytes and regular expressions: GPT-2's tokenizer, with no need of torch."""

from gpt2fast.tokenizer.tokenizer import GPT2Tokenizer

__all__ = ["GPT2Tokenizer"]
