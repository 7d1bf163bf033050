"""Driving a runner as the engine does: slots filled by hand, tokens read back."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast import kernels
from gpt2fast.kernels._triton.engine import configs
from gpt2fast.kernels._triton.target import Target, assume
from gpt2fast.kernels.decode_state import IDLE, RUNNING
from tests.kernels.devices import DEVICE
from tests.models.reference import randomize

VOCAB, POSITIONS = 97, 48


@contextlib.contextmanager
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our kernels, on a GPU or in the interpreter as one of compute capability 9.0."""
    with contextlib.ExitStack() as stack:
        if DEVICE == "cpu":  # the interpreter's time goes by programs and tiles, not by their size
            tile = configs.DecodeRowsTile(warps=64, repeat=4, unroll=1, programs=1)
            monkeypatch.setattr(configs, "decode_rows_tile", lambda *_: tile)
            stack.enter_context(assume(Target((9, 0), 1, 227 << 10)))
        stack.enter_context(kernels.backend("triton"))
        yield


def tiny(**overrides: Any) -> Any:
    """A tiny model on the device that the kernels are tested on."""
    sizes = {
        "vocab_size": VOCAB,
        "n_positions": POSITIONS,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "eos_token_id": 0,
    }
    model = gpt2fast.GPT2LMHeadModel(gpt2fast.GPT2Config(**{**sizes, **overrides}))
    randomize(model, std=0.4)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(0.2)  # else, with a tied head, a token predicts itself
    return model.to(DEVICE).eval()


def prompt(length: int) -> Tensor:
    """Random ids, none of which is 0, which may end sequences."""
    return torch.randint(1, VOCAB, (length,), device=DEVICE)


def fill(runner: Any, slot: int, ids: Tensor, new_tokens: int, **fields: Any) -> None:
    """Give a slot a prompt and what else is said of the sequence; it is not evaluated yet."""
    state = runner.state
    length = len(ids)
    state.tokens[slot, :length] = ids
    state.limits[slot] = length + new_tokens
    state.lengths[slot] = 0
    state.prefix_lengths[slot] = 0
    state.eos[slot] = -1
    state.seen[slot] = 0
    state.seen[slot, ids.long()] = 1
    state.scored[slot] = 1
    for name, value in fields.items():
        getattr(state, name)[slot] = torch.as_tensor(value, device=DEVICE)
    state.status[slot] = IDLE


def start(runner: Any, slot: int, ids: Tensor, new_tokens: int, at: int = 0, **fields: Any) -> None:
    """Fill a slot and evaluate the prompt from position ``at`` on, with the first new token."""
    fill(runner, slot, ids, new_tokens, **fields)
    runner.state.status[slot] = RUNNING
    runner.prefill(slot, at, len(ids))


def tokens(runner: Any, slot: int) -> list[int]:
    """Everything that the slot's sequence holds."""
    length = int(runner.state.lengths[slot])
    found: list[int] = runner.state.tokens[slot, : length + 1].tolist()
    return found


def plain(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> list[int]:
    """The same from the modules, a forward pass over everything for each token."""
    row = ids[None]
    with kernels.backend("torch"), torch.no_grad():
        for _ in range(new_tokens):
            row = torch.cat((row, model(row).logits[:, -1].argmax(-1, keepdim=True)), 1)
    found: list[int] = row[0].tolist()
    return found
