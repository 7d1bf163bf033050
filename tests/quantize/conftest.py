from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2Config, GPT2LMHeadModel, quantize

MODES = ("int8", "fp16", "int4")


@pytest.fixture
def floats() -> GPT2LMHeadModel:
    """A small model with random weights, biases and LayerNorms, each matrix of its own shape."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=199, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def saved(floats: GPT2LMHeadModel, mode: str, tmp_path: Path) -> Path:
    """A folder with the model quantised."""
    quantize(floats, mode).save_pretrained(tmp_path / mode)
    return tmp_path / mode
