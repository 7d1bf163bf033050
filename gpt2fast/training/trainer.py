"""The training loop: AdamW, warm-up and cosine decay, clipping, accumulation, exact resumption."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gpt2fast.model import GPT2LMHeadModel
from gpt2fast.training.data import BlockOrder
from gpt2fast.training.distributed import Workers, whole
from gpt2fast.training.loss import IGNORED, LanguageModelLoss
from gpt2fast.training.reports import Reports
from gpt2fast.training.sampled_head import VocabularySampler
from gpt2fast.training.settings import Settings, derived_seed, parameter_groups
from gpt2fast.training.signals import STOP_SIGNALS, stop_signals
from gpt2fast.training.speed import flops_per_token, matmul_rate
from gpt2fast.training.state import load_newest_checkpoint, save_checkpoint

# What the random numbers of a step are for: no two purposes share a seed.
_FOR_VOCABULARY, _FOR_DROPOUT = 0, 1


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved before stays as it is."""


class Trainer:
    """Trains a GPT2LMHeadModel in place, together with the ``workers`` of the run.

    ``train`` and ``valid`` are uint16 token streams. ``folder`` receives ``checkpoints/`` and
    ``log.jsonl``. ``data_id`` names the training data: resuming with another is an error.
    ``compile`` runs the layers through torch.compile. With FSDP the model's parameters are
    DTensors from here on: ``full_parameters`` gathers them.
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
        compile: bool = False,
        workers: Workers | None = None,
    ) -> None:
        config = model.config
        self.workers = workers = Workers() if workers is None else workers
        settings.check(config.n_positions, workers.count)
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
        self.device = model.device
        self._compiled = compile
        if compile:
            # Not the modules: their hooks, by which FSDP gathers parameters, stay outside. A graph
            # serves all layers, one for each length of row.
            for block in model.transformer.h:
                block.forward = torch.compile(block.forward, dynamic=False)
        loss = LanguageModelLoss(model, getattr(torch, settings.dtype))
        self.loss = workers.share(loss, model.transformer.h)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, settings.weight_decay),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            fused=True,
        )
        # As AdamW would at the first step, so that a checkpoint always finds its place.
        for parameter in model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.step, self.cursor, self.elapsed = 0, 0, 0.0
        self.reports = Reports(folder, active=workers.rank == 0)
        self._losses: list[float] = []  # of the steps since the last report
        self._step_seconds: list[float] = []
        self._saved_step: int | None = None

    @property
    def tokens(self) -> int:
        """Training tokens seen."""
        return self.cursor * self.order.block_size

    def full_parameters(self) -> dict[str, torch.Tensor]:
        """The parameters on the CPU, gathered by all processes together; empty but on rank 0."""
        gathered = {}
        for name, parameter in self.model.named_parameters():
            tensor = whole(parameter)
            if self.workers.rank == 0:
                gathered[name] = tensor.cpu()
        return gathered

    def resume(self) -> bool:
        """Continue from the newest checkpoint in the folder; False where there is none.

        Raises ValueError where it is of other data, another seed or another model.
        """
        run = load_newest_checkpoint(
            self.folder / "checkpoints", self._tensors(), self._check_resumable, self.workers
        )
        if run is None:
            return False
        self.step, self.cursor, self.elapsed = run["step"], run["cursor"], run["elapsed"]
        self._losses = run["losses"]
        self._saved_step = self.step
        self.reports.drop_after(self.step)
        return True

    def save(self) -> None:
        """Write a checkpoint of everything that the next steps depend on, if there is none yet."""
        if self._saved_step == self.step:
            return
        run = {
            "step": self.step,
            "cursor": self.cursor,
            "elapsed": self.elapsed,
            "losses": self._losses,
            "data": self.data_id,
            "settings": asdict(self.settings),
            "shapes": self._shapes(),
        }
        save_checkpoint(self.folder / "checkpoints", self.step, self._tensors(), run, self.workers)
        self._saved_step = self.step

    def _shapes(self) -> dict[str, list[int]]:
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        return {**shapes, "n_head": [self.model.config.n_head]}  # which no parameter shows

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and optimizer state by name: what a checkpoint is written from and read into.

        The optimizer's settings are not among them: a resumed run has those it is given.
        """
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def _check_resumable(self, run: dict[str, Any]) -> None:
        # With other data or another seed the order of the data would silently change.
        for name, was, now in (
            ("data", run["data"], self.data_id),
            ("seed", run["settings"]["seed"], self.settings.seed),
            *self._shape_pairs(run["shapes"]),
        ):
            if was != now:
                raise ValueError(f"cannot resume: {name} was {was!r}, now it is {now!r}")

    def _shape_pairs(self, theirs: dict[str, list[int]]) -> Iterator[tuple[str, Any, Any]]:
        ours = self._shapes()
        for name in sorted(ours.keys() | theirs.keys()):
            yield name, theirs.get(name, "absent"), ours.get(name, "absent")

    def run(self) -> int:
        """Train to the end of the schedule, or until a process gets SIGINT or SIGTERM, and save.

        Returns 0, or the number of the signal. Raises TrainingError on a loss or a gradient that
        is not finite, before it reaches the weights.
        """
        self._measure_peak()
        started = time.monotonic() - self.elapsed
        with (
            self.reports.bar(self.step, self.settings.steps) as advance,
            stop_signals(insist=self.workers.count == 1) as signals,
        ):
            while (progress := self.settings.progress(self.step, self.elapsed)) < 1:
                before = time.monotonic()
                self._losses.append(self._train_step(progress))
                now = time.monotonic()
                self._step_seconds.append(now - before)
                # All processes go by the first one's clock and stop at the same step.
                self.elapsed, *stops = self.workers.sum(
                    now - started if self.workers.rank == 0 else 0.0,
                    *(float(number in signals) for number in STOP_SIGNALS),
                )
                advance()
                done = self.settings.progress(self.step, self.elapsed)
                if done == 1 or self.step % self.log_every == 0:
                    self._report(progress, done)
                if self.valid is not None and self.step % self.valid_every == 0:
                    self._validate(progress)
                if any(stops) or self.step % self.save_every == 0:
                    self.save()
                if any(stops):
                    return next(int(n) for n, stop in zip(STOP_SIGNALS, stops, strict=True) if stop)
        self.save()
        return 0

    def evaluate(self, row_tokens: int, max_tokens: int | None = None) -> float:
        """Validation loss in nats a token, over the whole vocabulary, in the weights' dtype.

        Windows of ``row_tokens`` that share one token with the next, so that every token but the
        first is predicted once; with ``max_tokens``, that many tokens' worth of windows, evenly
        spaced. The processes share them out.
        """
        if self.valid is None:
            raise ValueError("no validation tokens were given")
        starts = np.arange(0, len(self.valid) - 1, row_tokens - 1)
        if max_tokens is not None and (count := max(1, max_tokens // row_tokens)) < len(starts):
            starts = starts[np.linspace(0, len(starts) - 2, count).astype(int)]
        settings, workers = self.settings, self.workers
        rows = max(1, settings.batch_tokens // settings.accumulate // workers.count // row_tokens)
        total, predicted = 0.0, 0
        self.loss.eval()
        with torch.no_grad(), self._uncompiled():
            # With FSDP all processes must take part in every forward pass, some with nothing.
            for first in range(0, len(starts), rows * workers.count):
                first += workers.rank * rows
                ids = torch.zeros(rows, row_tokens, dtype=torch.int64)
                labels = torch.full_like(ids, IGNORED)
                for row, start in enumerate(starts[first : first + rows]):
                    window = self.valid[start : start + row_tokens].astype(np.int64)
                    ids[row, : len(window)] = labels[row, : len(window)] = torch.from_numpy(window)
                    predicted += len(window) - 1
                total += self.loss(ids.to(self.device), labels=labels.to(self.device)).item()
        workers.release(self.loss)
        self.loss.train()
        total, all_predicted = workers.sum(total, predicted)
        return total / all_predicted

    def _uncompiled(self) -> contextlib.AbstractContextManager[None]:
        """Around evaluations, which are too few to compile for."""
        if not self._compiled:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _row_tokens(self, progress: float) -> int:
        if progress >= self.settings.long_from:
            return self.model.config.n_positions
        return self.settings.row_tokens

    def _samples_head(self, progress: float) -> bool:
        return self.sampler is not None and progress < self.settings.whole_from

    def _train_step(self, progress: float) -> float:
        """One step of the optimizer; returns the loss, the mean over all processes."""
        settings, workers = self.settings, self.workers
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate(self.step, progress)
        sample: tuple[torch.Tensor, torch.Tensor] | None = None
        if self.sampler is not None and self._samples_head(progress):
            # Keyed by the step, so that a resumed run, and every process, draws the same.
            generator = torch.Generator()
            generator.manual_seed(derived_seed(settings.seed, _FOR_VOCABULARY, self.step))
            ids, log_inclusion = self.sampler.draw(generator)
            sample = ids.to(self.device), log_inclusion.to(self.device)
        parts = settings.accumulate * workers.count
        blocks = settings.batch_tokens // self.model.config.n_positions // parts
        self.loss.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        # A step is cut into the same parts whether one process takes them in turn or several at
        # once, and the noise in a part follows from its place in the data.
        for number in range(settings.accumulate):
            start = self.cursor + (number * workers.count + workers.rank) * blocks
            self._seed_dropout(derived_seed(settings.seed, _FOR_DROPOUT, start))
            rows = self.order.blocks(start, blocks).view(-1, self._row_tokens(progress))
            with workers.part(self.loss, last=number == settings.accumulate - 1):
                loss = self.loss(rows.to(self.device), sample=sample) / settings.accumulate
                loss.backward()
            total += loss.item()
        self.cursor += blocks * parts
        (total,) = workers.sum(total / workers.count)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip))
        if not (math.isfinite(total) and torch.isfinite(norm)):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {total}, the gradient's norm {norm.item()}; "
                f"the last checkpoint in {self.folder / 'checkpoints'} is good; "
                "a lower learning rate or a longer warm-up may help"
            )
        self.optimizer.step()
        self.step += 1
        return total

    def _seed_dropout(self, seed: int) -> None:
        # This device's generator alone: torch.manual_seed goes through every kind of device.
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def _measure_peak(self) -> None:
        self.workers.sum(0.0)  # all at once, as they will train
        dtype = getattr(torch, self.settings.dtype)
        (self._peak,) = self.workers.sum(matmul_rate(self.device, dtype))
        self.reports.say(
            f"MFU is of {self._peak / 1e12:.3g} TFLOP/s, measured now: matrix products in "
            f"{self.settings.dtype}"
        )

    def _report(self, progress: float, done: float) -> None:
        """Print and log the mean loss and the speed of the steps since the last report.

        The last step began at ``progress`` and ended at ``done``.
        """
        loss = sum(self._losses) / len(self._losses)
        seconds = sum(self._step_seconds)
        speed = len(self._step_seconds) * self.settings.batch_tokens / seconds if seconds else 0.0
        self._losses, self._step_seconds = [], []
        vocabulary = self.model.config.vocab_size
        if self._samples_head(progress):
            vocabulary = self.settings.sampled_head
        flops = flops_per_token(self.model, self._row_tokens(progress), vocabulary)
        mfu = flops * speed / self._peak
        rate = self.optimizer.param_groups[0]["lr"]
        left = self.elapsed * (1 - done) / done if done else math.inf
        self.reports.say(
            f"step {self.step}  {100 * done:.1f}%  loss {loss:.4f}  "
            f"{speed:,.0f} tokens/s  MFU {100 * mfu:.1f}%  lr {rate:.2e}  "
            f"elapsed {self.elapsed / 60:.1f} min  left {left / 60:.1f} min"
        )
        self._log(
            loss=loss,
            lr=rate,
            tokens_per_second=round(speed),
            mfu=round(mfu, 4),
            progress=round(done, 6),
        )

    def _validate(self, progress: float) -> None:
        row_tokens = self._row_tokens(progress)
        loss = self.evaluate(row_tokens, self.valid_tokens)
        self.reports.say(
            f"step {self.step}  validation loss {loss:.4f} (rows of {row_tokens} tokens)"
        )
        self._log(valid_loss=loss, valid_row_tokens=row_tokens)

    def _log(self, **values: Any) -> None:
        minutes = round(self.elapsed / 60, 3)
        self.reports.log(step=self.step, tokens=self.tokens, minutes=minutes, **values)
