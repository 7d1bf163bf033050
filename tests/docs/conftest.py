from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2Config, GPT2LMHeadModel


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model over GPT-2's vocabulary."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder
