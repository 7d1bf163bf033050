"""The tokenizer that belongs to a checkpoint."""

import os
import sys
import warnings
from pathlib import Path

from gpt2fast.tokenizer import GPT2Tokenizer
from gpt2fast.tokenizer.files import HUB_NAME


def tokenizer_of(name_or_path: str | os.PathLike[str]) -> GPT2Tokenizer:
    """The checkpoint's own tokenizer where it has one, otherwise GPT-2's.

    For a repository of the Hub, whose tokenizer may only be out of reach, it says so. The tokenizer
    warns of no long texts: their length is checked against the model itself.
    """
    try:
        return GPT2Tokenizer.from_pretrained(name_or_path, model_max_length=sys.maxsize)
    except FileNotFoundError as error:
        if HUB_NAME.fullmatch(str(name_or_path)) and not Path(name_or_path).exists():
            warnings.warn(
                f"found no tokenizer of {name_or_path}, so GPT-2's is used: {error}", stacklevel=2
            )
        return GPT2Tokenizer(model_max_length=sys.maxsize)


def rules(tokenizer: GPT2Tokenizer) -> tuple[object, ...]:
    """What its ids of a text follow from; the ``repr`` is the same in every process."""
    return (
        tokenizer.get_vocab(),
        tokenizer.bpe_ranks,
        tokenizer.eos_token_id,
        tokenizer.add_prefix_space,
    )
