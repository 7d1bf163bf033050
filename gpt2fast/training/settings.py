"""What determines a run, besides the model and the data."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn


@dataclass(frozen=True)
class Settings:
    """What determines a run, besides the model and the data. Lengths are in tokens.

    A step takes ``batch_tokens`` tokens of all processes together, each computing its share in
    ``accumulate`` equal parts: blocks of ``n_positions`` tokens, cut into rows of ``row_tokens``.
    Progress goes from 0 to 1: the larger of step / ``steps`` and elapsed time / ``minutes`` (a
    resumed run keeps the time it had used). The rate warms up linearly over ``warmup`` steps, and
    follows a cosine in progress down to 0. From progress ``long_from`` on rows are whole blocks.
    The softmax is over the whole vocabulary, or, where ``sampled_head`` is not 0, over a sample of
    about that many tokens a step until progress ``whole_from``.
    """

    batch_tokens: int = 2048
    accumulate: int = 1
    row_tokens: int = 256
    steps: int | None = None
    minutes: float | None = None
    lr: float = 3e-3
    warmup: int = 300
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.1
    clip: float = 1.0
    long_from: float = 0.85
    sampled_head: int = 0
    whole_from: float = 0.95
    seed: int = 0
    dtype: str = "float32"

    def check(self, n_positions: int, processes: int = 1) -> None:
        """Raise ValueError where blocks of ``n_positions`` on ``processes`` cannot meet these."""
        if self.steps is None and self.minutes is None:
            raise ValueError("give the run a length: --steps, --max-minutes, or both")
        for name in ("steps", "minutes", "lr", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2**31), got {self.seed}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 steps, got {self.warmup}")
        if self.row_tokens < 2 or n_positions % self.row_tokens:
            raise ValueError(
                f"rows of {self.row_tokens} tokens do not divide n_positions = {n_positions}"
            )
        if self.accumulate < 1 or self.batch_tokens % (n_positions * self.accumulate * processes):
            raise ValueError(
                f"batch_tokens = {self.batch_tokens} is not a multiple of n_positions x "
                f"accumulate x processes = {n_positions} x {self.accumulate} x {processes}"
            )
        for name in ("long_from", "whole_from"):
            if not 0 <= (fraction := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is a fraction of the run, 0 to 1, got {fraction}")

    def progress(self, step: int, elapsed: float) -> float:
        """How much of the run lies behind, from 0 to 1; ``elapsed`` in seconds."""
        by_step = step / self.steps if self.steps else 0.0
        by_time = elapsed / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_step, by_time))

    def learning_rate(self, step: int, progress: float) -> float:
        """Warm-up times cosine (Loshchilov and Hutter 2017, equation 5, with no restart)."""
        return (
            self.lr
            * min(1.0, (step + 1) / (self.warmup + 1))
            * (0.5 + 0.5 * math.cos(math.pi * progress))
        )


def derived_seed(*key: int) -> int:
    """A 64-bit seed that follows from ``key`` alone.

    Mixed, because PyTorch's generator on a CPU looks at the lower 32 bits of its seed only.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, biases and LayerNorm weights do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
