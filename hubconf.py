"""GPT-2 through `torch.hub.load`, as pytorch-pretrained-BERT offered it.

    tokenizer = torch.hub.load(path, "gpt2Tokenizer", "gpt2", source="local")
    model = torch.hub.load(path, "gpt2LMHeadModel", "bundled", source="local")

The first argument of every entry point is a published model's name ("gpt2", "gpt2-medium", ...),
"bundled" for the small model that comes with the code, or a local folder. See `gpt2fast.legacy`.
"""

import typing

dependencies = ["torch", "numpy", "regex", "safetensors", "huggingface_hub", "tqdm"]

# The package is imported inside the entry points: torch.hub checks `dependencies` after importing
# this file, and takes every public callable in it for an entry point.


def gpt2Tokenizer(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
    """The byte-level BPE tokenizer: `gpt2fast.legacy.GPT2Tokenizer.from_pretrained`.

    Args:
        pretrained_model_name_or_path: the name or folder.
        special_tokens: tokens to add behind the vocabulary.
        max_len: longest sequence that gives no warning.
    """
    from gpt2fast.legacy import GPT2Tokenizer

    return GPT2Tokenizer.from_pretrained(*args, **kwargs)


def gpt2Model(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
    """The transformer without a head: `gpt2fast.legacy.GPT2Model.from_pretrained`.

    ``hidden_states, past = model(input_ids, past=past)``
    """
    from gpt2fast.legacy import GPT2Model

    return GPT2Model.from_pretrained(*args, **kwargs)


def gpt2LMHeadModel(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
    """With the language-model head: `gpt2fast.legacy.GPT2LMHeadModel.from_pretrained`.

    ``logits, past = model(input_ids, past=past)``; ``loss = model(input_ids, lm_labels=labels)``
    """
    from gpt2fast.legacy import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(*args, **kwargs)


def gpt2DoubleHeadsModel(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
    """With the multiple-choice head too: `gpt2fast.legacy.GPT2DoubleHeadsModel.from_pretrained`.

    The published checkpoints do not hold that head: it is newly initialised, and to be trained.

    ``logits, scores, past = model(input_ids, mc_token_ids)``
    """
    from gpt2fast.legacy import GPT2DoubleHeadsModel

    return GPT2DoubleHeadsModel.from_pretrained(*args, **kwargs)
