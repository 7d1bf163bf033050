"""A random GPT-2, small but at a trained model's scale, and the same model run the general way."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpt2fast import Engine, GPT2Config, GPT2LMHeadModel
from gpt2fast.engine import kept

VOCAB_SIZE, POSITIONS = 97, 48
IDS = [[9, 10, 11]]
PLAIN: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": []}


def make_model(**overrides: object) -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCAB_SIZE, "n_positions": POSITIONS, "n_embd": 32, "n_layer": 2}
    fields = {**sizes, "n_head": 4, "bos_token_id": 7, "eos_token_id": 7, **overrides}
    model = GPT2LMHeadModel(GPT2Config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif ".c_" in name and name.endswith("weight"):
                parameter.normal_(0.0, 1.5 * len(parameter) ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            else:
                parameter.normal_(0.0, 0.5)
    return model


def general(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A copy that no engine serves, because of a hook that does nothing."""
    model = copy.deepcopy(model)
    model.transformer.register_forward_pre_hook(lambda *_: None)
    return model


def engine_of(model: GPT2LMHeadModel) -> Engine:
    """The one that `generate` keeps."""
    engine = kept._KEPT[model].engine
    assert engine is not None
    return engine


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """What torch makes tensors of; the model is what it was."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def model() -> GPT2LMHeadModel:
    return make_model()
