"""The same random GPT-2, ours and pytorch-pretrained-BERT 0.6.2's.

Weights, biases and LayerNorm are random at the scale of the published ones, so that no term is
zero and attention is far from uniform. 0.6.2 has no dropout, so both are in evaluation mode.
"""

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_pretrained_bert as reference
import torch
from torch import nn

from gpt2fast import legacy

SIZES = {"n_positions": 40, "n_ctx": 40, "n_embd": 64, "n_layer": 3, "n_head": 4}
VOCAB_SIZE = 211

Pair = tuple[nn.Module, nn.Module]


def randomize(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_" in f".{name}" and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif ".c_" in name and name.endswith("weight"):
                parameter.normal_(0.0, len(parameter) ** -0.5)  # [in, out]
            else:
                parameter.normal_(0.0, 0.14)
    return model.eval()


@pytest.fixture
def config() -> legacy.GPT2Config:
    return legacy.GPT2Config(VOCAB_SIZE, **SIZES)


@pytest.fixture
def make_pair() -> Callable[..., Pair]:
    """Build a model by its class's name; returns ours and the reference with equal weights."""

    def make(name: str, vocab_size: int = VOCAB_SIZE, **sizes: int) -> Pair:
        fields: dict[str, Any] = {**SIZES, **sizes}
        ours = getattr(legacy, name)(legacy.GPT2Config(vocab_size, **fields))
        theirs = getattr(reference, name)(reference.GPT2Config(vocab_size, **fields))
        randomize(ours)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs.eval()

    return make


@pytest.fixture
def base(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair("GPT2Model")


@pytest.fixture
def lm(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair("GPT2LMHeadModel")


@pytest.fixture
def double_heads(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair("GPT2DoubleHeadsModel")
