"""A tiny model on disk and in memory, and the loop that scoring is compared with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast import GPT2Config, GPT2LMHeadModel
from tests.models.reference import randomize


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model over GPT-2's vocabulary; its context has 32 positions."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    model = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2))
    randomize(model, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a vocabulary of 97 tokens, for much work in little time."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    config = GPT2Config(vocab_size=97, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def naive(
    model: Any, ids: list[int], max_length: int, stride: int, bos: int | None = None
) -> list[float | None]:
    """Strided perplexity as users write it: a window at a time, labels that are ignored, logits."""
    tokens = ids if bos is None else [bos, *ids]
    found: list[float | None] = [None] * len(tokens)
    previous_end = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        window = torch.tensor([tokens[begin:end]], device=model.device)
        labels = window.clone()
        labels[:, : -(end - previous_end)] = -100
        logits = model(window).logits[0, :-1]
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        for i, label in enumerate(labels[0, 1:].tolist()):
            if label != -100:
                assert found[begin + i + 1] is None, "scored twice"
                found[begin + i + 1] = log_probs[i, label].item()
        previous_end = end
        if end == len(tokens):
            break
    return found if bos is None else found[1:]
