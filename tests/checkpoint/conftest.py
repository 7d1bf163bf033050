"""A tiny GPT-2 with random weights and biases, ours and transformers'."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from gpt2fast import GPT2Config, GPT2DoubleHeadsModel, GPT2LMHeadModel, GPT2Model

SIZES = {"vocab_size": 61, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}


def randomize(model: nn.Module) -> nn.Module:
    """Biases and LayerNorm weights too: fresh ones are all zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


@pytest.fixture
def config() -> GPT2Config:
    return GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)


@pytest.fixture
def base(config: GPT2Config) -> GPT2Model:
    return randomize(GPT2Model(config))


@pytest.fixture
def lm(config: GPT2Config) -> GPT2LMHeadModel:
    return randomize(GPT2LMHeadModel(config))


@pytest.fixture
def double_heads(config: GPT2Config) -> GPT2DoubleHeadsModel:
    return randomize(GPT2DoubleHeadsModel(config))


@pytest.fixture
def saved(lm: GPT2LMHeadModel, tmp_path: Path) -> Path:
    """A folder with a saved language model."""
    folder = tmp_path / "saved"
    lm.save_pretrained(folder)
    return folder


@pytest.fixture
def save_pickle(config: GPT2Config, tmp_path: Path) -> Callable[..., Path]:
    """Write tensors as ``pytorch_model.bin`` beside a ``config.json``; returns the folder."""

    def save(state_dict: dict[str, torch.Tensor], **options: bool) -> Path:
        folder = tmp_path / "pickle"
        folder.mkdir(exist_ok=True)
        config.to_json_file(folder / "config.json")
        torch.save(state_dict, folder / "pytorch_model.bin", **options)
        return folder

    return save
