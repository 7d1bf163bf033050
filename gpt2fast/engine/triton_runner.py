"""The runner on our kernels: static buffers, a CUDA graph for each kind of step.

Everything that a step reads or writes lies in tensors that are allocated before it, so a step is
recorded once for each bucket (rows, splits of the context, drafts) and then replayed; the host
tells it nothing but which slots take part. Two drivers do a step: a kernel for each phase, or one
persistent kernel for all of them (`gpt2fast.kernels.decode_step`).

Prompts: up to `ROWS_OF_A_PROMPT` tokens, and whatever stands behind a beginning that is in the
cache, are token rows of a step like any others. Longer ones from position 0 go through the ops of a
forward pass, in buckets of their length.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from gpt2fast.engine.agreement import disagreement
from gpt2fast.engine.float8 import cache_dtype_of, check_device, raw
from gpt2fast.engine.graphs import Replayer, empty_cache, has_dependent_launch
from gpt2fast.engine.prompt import PromptPass
from gpt2fast.engine.runner import OutOfMemory, first_line
from gpt2fast.engine.weights import pack, why_not
from gpt2fast.kernels import decode_step
from gpt2fast.kernels.decode_state import IDLE, DecodeState
from gpt2fast.kernels.decode_step import BUCKETS, FEW_ROWS, StepBuffers

if TYPE_CHECKING:
    from gpt2fast.generation.decoding import LanguageModel

Result = TypeVar("Result")

DRIVERS = ("auto", "graph", "persistent")
# Up to so many a prompt's tokens are rows of a step: one reading of the weights serves them, which
# then is what takes the time. Predicted.
ROWS_OF_A_PROMPT = 64
_PROMPT_LENGTHS = (128, 256, 512, 1024)  # buckets; beside them the capacity
_SHORTEST_CONTEXT = 64  # contexts come in powers of two from here on, for the number of splits
_ALIGNMENT = 8  # elements; loads are of 16 bytes
_MAX_HEAD_SIZE = 128
# Tokens that a proposal matches at most: compiling takes longer with each. What is proposed changes
# no token.
_LONGEST_NGRAM = 16


def unsupported(model: "LanguageModel") -> str | None:
    """Why this runner cannot serve a model, by its sizes too; None where it can."""
    reason = why_not(model)
    if reason is not None:
        return reason
    config = model.config
    width, inner, head_size = config.n_embd, config.inner_size, config.head_size
    if width % _ALIGNMENT or inner % _ALIGNMENT:
        return (
            f"widths must be multiples of {_ALIGNMENT}; got {width}, and {inner} inside the "
            "perceptron"
        )
    if head_size > _MAX_HEAD_SIZE:
        return f"heads are {head_size} wide; the kernels know up to {_MAX_HEAD_SIZE}"
    if width * max(3 * width, inner, config.vocab_size) >= 1 << 31:
        return "a matrix has 2^31 weights or more"
    return None


class TritonRunner:
    """A `gpt2fast.engine.runner.Runner` on a GPU, or in Triton's interpreter.

    Args:
        model: one for which `unsupported` gives None. Its weights are copied, but for embeddings;
            the model itself is not kept.
        slots: sequences that run at a time.
        capacity: positions of each, at most the model's.
        bits: 8 or 4 for quantised weights, as `gpt2fast.engine.weights.pack`.
        cache_dtype: the model's (None), or `torch.float8_e4m3fn`, from capability 8.9 on.
        driver: "graph" for a kernel a phase, "persistent" for one kernel a step where there are few
            rows, "auto" for the second on GPUs without dependent launch (before capability 9.0),
            where it gives what the first does.

    Raises:
        ValueError: the model is not supported, or a number is out of range.
        OutOfMemory: here, or whenever something is used for the first time. What the runner held is
            given back before it is raised here; later the state is as before the call.
    """

    shares_prefix = True
    proposes = True
    look_every = 16

    def __init__(
        self,
        model: "LanguageModel",
        slots: int,
        capacity: int,
        *,
        bits: int | None = None,
        cache_dtype: torch.dtype | None = None,
        driver: str = "auto",
    ) -> None:
        reason = unsupported(model)
        if reason is not None:
            raise ValueError(f"the model cannot run on the engine's kernels: {reason}")
        if slots < 1 or not 1 <= capacity <= model.config.n_positions:
            raise ValueError(
                f"expected slots of at least 1 and a capacity within {model.config.n_positions}; "
                f"got {slots} and {capacity}"
            )
        if driver not in DRIVERS:
            raise ValueError(f"driver must be one of {DRIVERS}; got {driver!r}")
        self._dtype, self._device = model.dtype, model.device
        cache_dtype = cache_dtype_of(model, cache_dtype)
        check_device(cache_dtype, self._device)
        self.slots, self.capacity, self._driver = slots, capacity, driver
        self._pdl = has_dependent_launch(self._device)
        self._replayer = Replayer(self._device)
        self._buffers: dict[tuple[int, int], StepBuffers] = {}
        self._tables: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._prompt: PromptPass | None = None
        self._resident: dict[tuple[int, bool, int, int], StepBuffers] = {}
        self._trusted = True  # the persistent kernel, until it is seen to err
        with self.working():
            self._build(model, bits, cache_dtype)

    def _build(self, model: "LanguageModel", bits: int | None, cache_dtype: torch.dtype) -> None:
        config = model.config
        try:
            self.weights = pack(model, bits)
            self.state = DecodeState.empty(
                self.slots, self.capacity, config.vocab_size, self._device
            )
            # Zeros: what has not been written is masked, but zero times NaN is no zero.
            self._cache = torch.zeros(
                *(config.n_layer, 2, self.slots),
                *(config.n_head, self.capacity, config.head_size),
                dtype=cache_dtype,
                device=self._device,
            )
        except torch.OutOfMemoryError as error:
            self.close()
            raise OutOfMemory(first_line(error)) from None

    def prefill(self, slot: int, start: int, end: int) -> None:
        """As the protocol has it. Waits for nothing."""
        with self.working():
            if start == 0 and end > ROWS_OF_A_PROMPT:
                self._prefill_whole(slot, end)
            else:
                self._prefill_rows(slot, start, end)
            # Where nothing was to be chosen; a choice that failed has brought no token.
            own = slice(slot, slot + 1)
            self.state.lengths[own].add_(self.state.status[own] == IDLE)

    def _prefill_whole(self, slot: int, length: int) -> None:
        """All of a prompt at once, and the choice behind its last token."""
        if self._prompt is None:
            self._prompt = self._made(lambda: PromptPass(self.weights, self._cache))
        prompt = self._prompt
        padded = min(n for n in (*_PROMPT_LENGTHS, self.capacity) if n >= length)
        padded = min(padded, self.capacity)
        prompt.ids[0, :padded] = self.state.tokens[slot, :padded]
        prompt.slot.fill_(slot)
        prompt.last.fill_(length - 1)
        buffers = self._rows([slot], [0], 1)

        def work() -> None:
            buffers.residual.copy_(prompt(padded))
            decode_step.evaluate_head(self.weights, buffers, greedy=False, pdl=self._pdl)

        self._made(lambda: self._replayer.run(("prompt", padded), work))
        self._choose_behind(slot, length, buffers)

    def _prefill_rows(self, slot: int, start: int, end: int) -> None:
        """Tokens behind others, or few, as rows of steps."""
        most = BUCKETS[-1]
        for low in range(start, end, most):
            rows = min(end - low, most)
            self.state.lengths[slot] = low
            buffers = self._rows([slot] * rows, list(range(rows)), low + rows)
            key = ("rows", buffers.rows, buffers.splits)
            self._replayer.run(key, partial(self._evaluate, buffers, False))
        # Of all rows' logits those of the last one count, which is the newest token now.
        unused = [-1] * (rows - 1)
        self._choose_behind(slot, end, self._rows([*unused, slot], [0] * rows, low + rows))

    def _choose_behind(self, slot: int, end: int, buffers: StepBuffers) -> None:
        """Choose the token behind a prompt of so many, if the slot is RUNNING."""
        self.state.lengths[slot] = end - 1
        self._replayer.run(
            ("choice", buffers.rows), partial(self._choose, buffers, 0, greedy=False)
        )

    def _evaluate(self, buffers: StepBuffers, greedy: bool) -> None:
        decode_step.evaluate(
            self.weights, self.state, self._cache, buffers, greedy=greedy, pdl=self._pdl
        )

    def _choose(self, buffers: StepBuffers, drafts: int, greedy: bool) -> None:
        decode_step.select_and_commit(self.state, buffers, drafts, greedy=greedy, pdl=self._pdl)

    def advance(
        self,
        slots: Sequence[int],
        steps: int,
        drafts: int = 0,
        ngram: int = 0,
        *,
        plain: bool = False,
        context: int = 0,
    ) -> None:
        """As the protocol has it. Waits for nothing."""
        a_slot = drafts + 1
        if a_slot > BUCKETS[-1]:
            raise ValueError(f"at most {BUCKETS[-1] - 1} drafts; got {drafts}")
        if steps < 1:  # else what serves such a context would be compiled for nothing
            return
        keys = context + steps * a_slot if context else self.capacity
        together = BUCKETS[-1] // a_slot
        ngram = min(ngram, _LONGEST_NGRAM)
        with self.working():
            for i in range(0, len(slots), together):
                self._advance(list(slots[i : i + together]), steps, drafts, ngram, plain, keys)

    def _advance(
        self, slots: list[int], steps: int, drafts: int, ngram: int, plain: bool, keys: int
    ) -> None:
        rows = [slot for slot in slots for _ in range(drafts + 1)]
        buffers = self._rows(rows, list(range(drafts + 1)) * len(slots), keys)
        key = ("step", buffers.rows, buffers.splits, drafts, ngram, plain)
        persistent = self._persistent(buffers, plain, drafts, ngram)
        if persistent is not None:
            # Where it counts one launch serves all steps: there is nothing to record.
            decode_step.decode_persistent(
                self.weights,
                self.state,
                self._cache,
                persistent,
                steps,
                greedy=plain,
                drafts=drafts,
                ngram=ngram,
            )
            return

        def work() -> None:
            if drafts and ngram:
                decode_step.propose(self.state, buffers, drafts, ngram, pdl=self._pdl)
            self._evaluate(buffers, plain)
            self._choose(buffers, drafts, plain)

        for _ in range(steps):
            self._replayer.run(key, work)

    def _persistent(
        self, buffers: StepBuffers, plain: bool, drafts: int, ngram: int
    ) -> StepBuffers | None:
        """Buffers for the persistent kernel, where it is to do this step."""
        automatic = self._driver == "auto"
        if buffers.rows > FEW_ROWS or self._driver == "graph":
            return None
        # With dependent launch a kernel a phase is sooner done, by a tenth on an H100. Where tokens
        # are chosen by their logits this is two launches a step, on the host's time.
        if automatic and (
            self._device.type == "cpu" or self._pdl or not self._trusted or not plain
        ):
            return None
        key = buffers.rows, plain, drafts, ngram  # each a kernel of its own
        if key not in self._resident:
            own = self._step_buffers(buffers.rows, self._persistent_splits(buffers.rows))
            made = self._made(lambda: decode_step.persistent_buffers(own))
            if automatic and not self._agrees(buffers, made, plain, drafts, ngram):
                return None
            self._resident[key] = made
        return self._resident[key]

    @property
    def served_by(self) -> str:
        """The driver of the steps of few rows so far, or of all if there were none."""
        return "persistent" if self._resident else "graph"

    def _agrees(
        self, buffers: StepBuffers, persistent: StepBuffers, plain: bool, drafts: int, ngram: int
    ) -> bool:
        """Whether the persistent kernel runs here, and gives what the kernels by phases give."""
        held = [getattr(self.state, field.name) for field in dataclasses.fields(DecodeState)]
        trial = self._made(lambda: DecodeState(*(tensor.clone() for tensor in held)))
        reason = disagreement(
            *(self.weights, trial, self._cache, buffers, persistent),
            greedy=plain,
            drafts=drafts,
            ngram=ngram,
            pdl=self._pdl,
        )
        if reason is not None:
            self._trusted = False
            warnings.warn(
                f"decoding takes a kernel a phase instead of one kernel: {reason}", stacklevel=2
            )
        return reason is None

    def _rows(self, slots: list[int], offsets: list[int], keys: int) -> StepBuffers:
        """Buffers whose tables say these rows, filled up with unused ones.

        Args:
            keys: how many positions a row sees at most.
        """
        size = decode_step.bucket(len(slots))
        buffers = self._step_buffers(size, self._splits(size, keys))
        unused = size - len(slots)
        table = (*slots, *[-1] * unused), (*offsets, *[0] * unused)
        if self._tables.get(size) != table:
            # From pinned memory: any other copy would wait for all that was issued before.
            pinned = self._device.type == "cuda"
            values = torch.tensor(table, dtype=torch.int32, pin_memory=pinned)
            buffers.slots.copy_(values[0], non_blocking=True)
            buffers.offsets.copy_(values[1], non_blocking=True)
            self._tables[size] = table
        return buffers

    def _splits(self, rows: int, keys: int) -> int:
        """Of the keys, for a bucket of rows and of the context."""
        bucket = _SHORTEST_CONTEXT
        while bucket < keys:
            bucket *= 2
        # Imported here: whoever looks at this module has no Triton yet.
        from gpt2fast.kernels._triton.engine.configs import engine_splits
        from gpt2fast.kernels._triton.target import current_target

        shape = self._cache.shape
        return engine_splits(
            rows, shape[3], min(bucket, self.capacity), shape[5], current_target(self._device)
        )

    def _persistent_splits(self, rows: int) -> int:
        """Of the keys in the persistent kernel, whatever the context."""
        from gpt2fast.kernels._triton.engine.configs import persistent_splits
        from gpt2fast.kernels._triton.engine.persistent import persistent_programs

        positions, head_size = self.weights.wpe.shape[0], self._cache.shape[5]
        programs = persistent_programs(self._device)
        return persistent_splits(rows, self._cache.shape[3], positions, head_size, programs)

    def _step_buffers(self, rows: int, splits: int) -> StepBuffers:
        """Those of a bucket; all but what the splits leave is one for all numbers of splits."""
        found = self._buffers.get((rows, splits))
        if found is None:
            base = self._buffers.get((rows, 1))
            if base is None:
                base = self._made(lambda: StepBuffers.allocate(self.weights, rows, 1))
                self._buffers[rows, 1] = base
            found = base
            if splits > 1:
                found = self._made(lambda: base.with_splits(splits))
                self._buffers[rows, splits] = found
        return found

    def _made(self, make: Callable[[], Result]) -> Result:
        """What ``make`` gives, with all that can be made again given up where memory is short."""
        try:
            return make()
        except torch.OutOfMemoryError:
            self._replayer.forget()
            empty_cache()
        try:
            return make()
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(first_line(error)) from None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """As the protocol has it."""
        # State and cache are ordinary tensors whatever mode the caller is in; leaving inference
        # mode turns gradients on.
        with torch.inference_mode(False), torch.no_grad(), self._replayer.stream():
            yield

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        with self.working():
            cache = raw(self._cache)
            cache[:, :, target, :, :length] = cache[:, :, source, :, :length]

    def keys_values(self, slot: int, length: int) -> list[Tensor]:
        """As the protocol has it. Waits for the device."""
        with self.working():
            layers = self._cache[:, :, slot, :, :length].to(self._dtype, copy=True)
            shared = min(int(self.state.prefix_lengths[slot]), length)
            if shared:
                source = int(self.state.prefix_slots[slot])
                layers[:, :, :, :shared] = self._cache[:, :, source, :, :shared]
        return list(layers)

    def close(self) -> None:
        self._replayer.close()
        self._buffers.clear()
        self._resident.clear()
        self._tables.clear()
        for name in ("weights", "state", "_cache", "_prompt"):
            self.__dict__.pop(name, None)
