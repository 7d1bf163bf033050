"""The tokenizer that belongs to a checkpoint."""

import os
import sys

from gpt2fast.tokenizer import GPT2Tokenizer


def tokenizer_of(name_or_path: str | os.PathLike[str]) -> GPT2Tokenizer:
    """The checkpoint's own tokenizer where it has one, otherwise GPT-2's.

    It warns of no long texts: their length is checked against the model itself.
    """
    try:
        return GPT2Tokenizer.from_pretrained(name_or_path, model_max_length=sys.maxsize)
    except FileNotFoundError:
        return GPT2Tokenizer(model_max_length=sys.maxsize)
