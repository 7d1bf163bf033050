"""The training loop: AdamW, warm-up and cosine decay, clipping, accumulation, exact resumption."""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from gpt2fast.files import replacing
from gpt2fast.model import GPT2LMHeadModel
from gpt2fast.training.data import BlockOrder
from gpt2fast.training.sampled_head import VocabularySampler, sampled_head_loss
from gpt2fast.training.state import load_newest_checkpoint, save_checkpoint


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved before stays as it is."""


@dataclass(frozen=True)
class Settings:
    """What determines a run, besides the model and the data. Lengths are in tokens.

    A step takes ``batch_tokens`` tokens in ``accumulate`` equal parts: blocks of ``n_positions``
    tokens, cut into rows of ``row_tokens``. Progress goes from 0 to 1: the larger of step /
    ``steps`` and elapsed time / ``minutes`` (a resumed run keeps the time it had used). The rate
    warms up linearly over ``warmup`` steps, and follows a cosine in progress down to 0. From
    progress ``long_from`` on rows are whole blocks. The softmax is over the whole vocabulary, or,
    where ``sampled_head`` is not 0, over a sample of about that many tokens a step until progress
    ``whole_from``.
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

    def check(self, n_positions: int) -> None:
        """Raise ValueError where the settings cannot be met with blocks of ``n_positions``."""
        if self.steps is None and self.minutes is None:
            raise ValueError("give the run a length: --steps, --max-minutes, or both")
        for name in ("steps", "minutes", "lr", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2**31), got {self.seed}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 steps, got {self.warmup}")
        if self.row_tokens < 2 or n_positions % self.row_tokens:
            raise ValueError(
                f"rows of {self.row_tokens} tokens do not divide n_positions = {n_positions}"
            )
        if self.accumulate < 1 or self.batch_tokens % (n_positions * self.accumulate):
            raise ValueError(
                f"batch_tokens = {self.batch_tokens} is not a multiple of "
                f"n_positions x accumulate = {n_positions} x {self.accumulate}"
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, biases and LayerNorm weights do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one of the same kind acts as usual."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for stopped_by, handler in previous.items():
            signal.signal(stopped_by, handler)


class Trainer:
    """Trains a GPT2LMHeadModel in place.

    ``train`` and ``valid`` are uint16 token streams. ``folder`` receives ``checkpoints/`` and
    ``log.jsonl``. ``data_id`` names the training data: resuming with another is an error.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        train: np.ndarray,
        valid: np.ndarray | None,
        folder: Path,
        settings: Settings,
        data_id: str,
        log_every: int = 50,
        valid_every: int = 500,
        save_every: int = 500,
        valid_tokens: int = 32768,
    ) -> None:
        config = model.config
        settings.check(config.n_positions)
        self.model, self.valid, self.folder, self.settings = model, valid, folder, settings
        self.data_id, self.valid_tokens = data_id, valid_tokens
        self.log_every, self.valid_every, self.save_every = log_every, valid_every, save_every
        for every in (log_every, valid_every, save_every):
            if every < 1:
                raise ValueError(f"reports and checkpoints come every 1 or more steps, got {every}")
        if valid is not None and len(valid) < 2:
            raise ValueError(f"validation needs at least two tokens, got {len(valid)}")
        for name, tokens in (("training", train), ("validation", valid)):
            if tokens is not None and (top := int(tokens.max())) >= config.vocab_size:
                raise ValueError(
                    f"{name} data holds token {top}, vocab_size is {config.vocab_size}"
                )
        self.order = BlockOrder(train, config.n_positions, settings.seed)
        self.sampler = None
        if settings.sampled_head:
            counts = torch.from_numpy(np.bincount(train, minlength=config.vocab_size))
            self.sampler = VocabularySampler(counts, settings.sampled_head)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, settings.weight_decay),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            fused=True,
        )
        self.step, self.cursor, self.elapsed = 0, 0, 0.0
        self.log_path = folder / "log.jsonl"

    @property
    def tokens(self) -> int:
        """Training tokens seen."""
        return self.cursor * self.order.block_size

    def resume(self) -> bool:
        """Continue from the newest checkpoint in the folder; False where there is none."""
        state = load_newest_checkpoint(self.folder / "checkpoints")
        if state is None:
            return False
        # With other data or another seed the order of the data would silently change.
        for name, was, now in (
            ("data", state["data"], self.data_id),
            ("seed", state["settings"]["seed"], self.settings.seed),
        ):
            if was != now:
                raise ValueError(f"cannot resume: {name} was {was!r}, now it is {now!r}")
        for name, tensor in self.model.state_dict().items():
            theirs = list(state["model"][name].shape) if name in state["model"] else "absent"
            if theirs != list(tensor.shape):
                raise ValueError(
                    f"cannot resume: {name} was {theirs}, now it is {list(tensor.shape)}"
                )
        self.model.load_state_dict(state["model"])
        # The optimizer's settings may have changed: keep ours, where loading would bring theirs.
        groups = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, ours in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(betas=ours["betas"], weight_decay=ours["weight_decay"])
        torch.set_rng_state(state["rng"])
        if self.model.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.model.device)
        self.step, self.cursor, self.elapsed = state["step"], state["cursor"], state["elapsed"]
        self._drop_log_after(self.step)
        return True

    def save(self) -> Path:
        """Write a checkpoint of everything that the next steps depend on."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "cursor": self.cursor,
            "elapsed": self.elapsed,
            "settings": asdict(self.settings),
            "data": self.data_id,
        }
        if self.model.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.model.device)
        return save_checkpoint(self.folder / "checkpoints", self.step, state)

    def run(self) -> int:
        """Train to the end of the schedule, or until SIGINT or SIGTERM, and save.

        Returns 0, or the number of the signal. Raises TrainingError on a loss or a gradient that
        is not finite, before it reaches the weights.
        """
        started = time.monotonic() - self.elapsed
        self.log_path.touch()
        self._window: list[float] = []
        self._window_start = time.monotonic()
        bar = tqdm(
            desc="train",
            unit="step",
            initial=self.step,
            total=self.settings.steps,
            disable=not sys.stderr.isatty(),
        )
        with bar, _stop_signals() as signals:
            while (progress := self.settings.progress(self.step, self.elapsed)) < 1:
                self._window.append(self._train_step(progress))
                self.elapsed = time.monotonic() - started
                bar.update()
                if self.step % self.log_every == 0:
                    self._report(progress, bar)
                if self.valid is not None and self.step % self.valid_every == 0:
                    self._validate(progress, bar)
                if signals or self.step % self.save_every == 0:
                    self.save()
                if signals:
                    return signals[0]
            if self._window:
                self._report(1.0, bar)
        self.save()
        return 0

    def evaluate(self, row_tokens: int, max_tokens: int | None = None) -> float:
        """Validation loss in nats a token, over the whole vocabulary, in the weights' dtype.

        Windows of ``row_tokens`` that share one token with the next, so that every token but the
        first is predicted once; with ``max_tokens``, that many tokens' worth of windows, evenly
        spaced.
        """
        if self.valid is None:
            raise ValueError("no validation tokens were given")
        starts = np.arange(0, len(self.valid) - 1, row_tokens - 1)
        if max_tokens is not None and (count := max(1, max_tokens // row_tokens)) < len(starts):
            starts = starts[np.linspace(0, len(starts) - 2, count).astype(int)]
        was_training = self.model.training
        self.model.eval()
        total, predicted = 0.0, 0
        with torch.no_grad():
            for start in starts:
                ids = torch.from_numpy(self.valid[start : start + row_tokens].astype(np.int64))
                ids = ids[None].to(self.model.device)
                loss = self.model(ids, labels=ids, use_cache=False).loss
                total += loss.item() * (ids.size(1) - 1)
                predicted += ids.size(1) - 1
        self.model.train(was_training)
        return total / predicted

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.settings.dtype)
        return torch.autocast(
            self.model.device.type, dtype=dtype, enabled=dtype is not torch.float32
        )

    def _row_tokens(self, progress: float) -> int:
        if progress >= self.settings.long_from:
            return self.model.config.n_positions
        return self.settings.row_tokens

    def _train_step(self, progress: float) -> float:
        settings, model = self.settings, self.model
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate(self.step, progress)
        sample: tuple[torch.Tensor, torch.Tensor] | None = None
        if self.sampler is not None and progress < settings.whole_from:
            # Keyed by the step, so that a resumed run draws the same.
            generator = torch.Generator().manual_seed((settings.seed << 32) + self.step)
            ids, log_inclusion = self.sampler.draw(generator)
            sample = ids.to(model.device), log_inclusion.to(model.device)
        blocks = settings.batch_tokens // model.config.n_positions // settings.accumulate
        model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(settings.accumulate):
            rows = self.order.blocks(self.cursor, blocks).view(-1, self._row_tokens(progress))
            self.cursor += blocks
            loss = self._loss(rows.to(model.device), sample) / settings.accumulate
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        if not (math.isfinite(total) and torch.isfinite(norm)):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {total}, the gradient's norm {norm.item()}; "
                f"the last checkpoint in {self.folder / 'checkpoints'} is good; "
                "a lower learning rate or a longer warm-up may help"
            )
        self.optimizer.step()
        self.step += 1
        return total

    def _loss(
        self, rows: torch.Tensor, sample: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Mean cross-entropy of ``rows``, int64 ``[B, T]``: T - 1 predictions a row."""
        batch, length = rows.shape
        # Rows keep their positions in the block, so that every position is trained throughout.
        positions = torch.arange(self.model.config.n_positions, device=rows.device)
        positions = positions.view(-1, length).repeat(batch * length // len(positions), 1)
        with self._autocast():
            if sample is None:
                return self.model(rows, labels=rows, position_ids=positions, use_cache=False).loss
            hidden = self.model.transformer(rows, position_ids=positions, use_cache=False)[0]
        hidden = hidden[:, :-1].flatten(0, 1)
        return sampled_head_loss(
            hidden.float(),
            self.model.lm_head.weight,
            rows[:, 1:].flatten(),
            *sample,
            dtype=getattr(torch, self.settings.dtype),
        )

    def _report(self, progress: float, bar: tqdm) -> None:
        """Print and log the mean loss and the speed since the last report."""
        now = time.monotonic()
        loss = sum(self._window) / len(self._window)
        speed = len(self._window) * self.settings.batch_tokens / (now - self._window_start)
        self._window, self._window_start = [], now
        rate = self.optimizer.param_groups[0]["lr"]
        left = self.elapsed * (1 - progress) / progress if progress else math.inf
        text = (
            f"step {self.step}  {100 * progress:.1f}%  loss {loss:.4f}  "
            f"{speed:,.0f} tokens/s  lr {rate:.2e}  "
            f"elapsed {self.elapsed / 60:.1f} min  left {left / 60:.1f} min"
        )
        bar.write(text) if not bar.disable else print(text, flush=True)
        self._log(loss=loss, lr=rate, tokens_per_second=round(speed), progress=round(progress, 6))

    def _validate(self, progress: float, bar: tqdm) -> None:
        row_tokens = self._row_tokens(progress)
        loss = self.evaluate(row_tokens, self.valid_tokens)
        text = f"step {self.step}  validation loss {loss:.4f} (rows of {row_tokens} tokens)"
        bar.write(text) if not bar.disable else print(text, flush=True)
        self._log(valid_loss=loss, valid_row_tokens=row_tokens)

    def _log(self, **values: Any) -> None:
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "minutes": round(self.elapsed / 60, 3),
            **values,
        }
        with self.log_path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _drop_log_after(self, step: int) -> None:
        """Forget what was logged after the checkpoint: those steps are taken again."""
        if not self.log_path.is_file():
            return
        kept = []
        for line in self.log_path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line cut short by a kill
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        with replacing(self.log_path) as partial:
            partial.write_text("".join(kept))
