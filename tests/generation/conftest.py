"""The same random GPT-2, ours and transformers', small but at a trained model's scale.

Weights are large enough for peaked distributions and attention far from uniform; biases and
LayerNorm weights are random too. Token 7 ends a row and turns up often enough.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from gpt2fast import GPT2Config, GPT2LMHeadModel

VOCAB_SIZE = 97
EOS = 7
SIZES = {"vocab_size": VOCAB_SIZE, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}

Pair = tuple[GPT2LMHeadModel, Any]


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif ".c_" in name and name.endswith("weight"):
                parameter.normal_(0.0, 1.5 * len(parameter) ** -0.5)  # [in, out]
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            else:
                parameter.normal_(0.0, 0.5)


@pytest.fixture
def make_pair() -> Callable[..., Pair]:
    """Build (ours, transformers') with one set of weights."""

    def make(**overrides: Any) -> Pair:
        fields = {**SIZES, "bos_token_id": EOS, "eos_token_id": EOS, **overrides}
        reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
        randomize(reference)
        model = GPT2LMHeadModel(GPT2Config(**fields)).eval()
        model.load_state_dict(reference.state_dict())
        return model, reference

    return make


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


@pytest.fixture
def model(pair: Pair) -> GPT2LMHeadModel:
    return pair[0]


@pytest.fixture
def padded() -> tuple[Tensor, Tensor]:
    """Prompts of 9, 5 and 2 tokens padded on the left, and their mask."""
    ids = torch.randint(8, VOCAB_SIZE, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :7] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.fixture
def prompts(padded: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The same prompts without padding."""
    return [ids[mask.bool()] for ids, mask in zip(*padded, strict=True)]
