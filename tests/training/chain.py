"""A tiny model on a language that is easy to learn: what the tests of training train."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2fast import GPT2Config, GPT2LMHeadModel
from gpt2fast.training.settings import Settings
from gpt2fast.training.trainer import Trainer

SETTINGS = Settings(
    batch_tokens=128,
    row_tokens=16,
    steps=60,
    lr=1e-2,
    warmup=5,
    beta2=0.98,
    long_from=0.8,
    sampled_head=24,
    whole_from=0.9,
)
# The parts of a step are the same whoever takes them, and with them the noise of dropout.
IN_PARTS = replace(SETTINGS, steps=40, accumulate=4)


def chain_tokens(length: int = 4000, seed: int = 0) -> np.ndarray:
    """A Markov chain on 64 tokens: after one token come two others, equally likely: ln 2 nats."""
    rng = np.random.default_rng(seed)
    successors = np.random.default_rng(99).permutation(64)
    tokens = [0]
    for bit in rng.integers(2, size=length - 1):
        tokens.append((successors[tokens[-1]] + bit) % 64)
    return np.array(tokens, dtype=np.uint16)


def chain_trainer(
    folder: Path, settings: Settings = SETTINGS, dropout: float = 0.1, **options: Any
) -> Trainer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    pdrop = {"resid_pdrop": dropout, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **pdrop))
    folder.mkdir(exist_ok=True)
    options = {"log_every": 10, "valid_every": 20, "save_every": 7, **options}
    valid = chain_tokens(500, 1)
    return Trainer(model, chain_tokens(), valid, folder, settings, data_id="chain", **options)
