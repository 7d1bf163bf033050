"""Models of transformers, as they are in float64 and accelerated in float32."""

import copy
from typing import Any

import transformers

import gpt2fast
from tests.models.reference import randomize, sizes


def plain(kind: str = "GPT2LMHeadModel", attention: str = "sdpa", **overrides: Any) -> Any:
    """A random model of transformers in eval mode, of a trained model's scale."""
    fields = {"num_labels": 3, "pad_token_id": 1, **overrides}
    config = transformers.GPT2Config(**sizes(**fields), attn_implementation=attention)
    model = getattr(transformers, kind)(config).eval()
    randomize(model)
    return model


def pair(kind: str = "GPT2LMHeadModel", attention: str = "sdpa", **overrides: Any) -> Any:
    """(accelerated in float32, as it is in float64), with the same weights."""
    model = plain(kind, attention, **overrides)
    reference = copy.deepcopy(model).double()
    return gpt2fast.accelerate(model), reference
