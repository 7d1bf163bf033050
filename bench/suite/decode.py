"""The decode ladder: a whole ``generate`` against transformers and a hand-written loop.

A case is a model, a batch and a context: prompts of so many random tokens, continued greedily by up
to 64. Parity first: every contender's tokens are held against the float32 model (with the rounded
weights, or keys and values, where they were rounded), which reads each row and must find every
token as good as its best one, but for what plain PyTorch errs in bfloat16 on the same rows. Then
all that passed run in turn. The time of a token is that of n tokens, less that of the first, over
n - 1.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.suite import decode_peers
from bench.suite.decode_peers import Generate
from bench.suite.decode_times import Steps, step_times, summary, whole_times
from gpt2fast import kernels
from gpt2fast.engine.float8 import FLOAT8, check_device, to_float8
from gpt2fast.engine.runner import OutOfMemory
from gpt2fast.engine.triton_runner import TritonRunner
from gpt2fast.engine.weights import pack
from gpt2fast.kernels.decode_state import RUNNING
from gpt2fast.kernels.packing import DecodeWeights, Matrix, dequantize
from tests.tolerances import BUDGET

NEW_TOKENS = 64
_SILENCE, _SILENCE_COMPILING = 60.0, 240.0  # how long nothing may be heard
_JUDGED_ROWS = 4  # of a batch, that are held against the float32 model

OURS, PERSISTENT, INT8, INT4 = "graph", "persistent", "int8", "int4"
FP8 = "fp8 cache"
GENERATE = "generate"
EAGER, TUNED, STATIC, LOOP = "transformers", "transformers tuned", "transformers static", "loop"
ENGINES = (OURS, PERSISTENT, INT8, INT4, FP8, GENERATE)
_ALONE = (OURS, PERSISTENT, INT8, INT4, GENERATE)  # of one row; the cache is little to read there
# Those last that compile for long: whoever comes when no time is left is not measured.
ALL = (*_ALONE, EAGER, TUNED, LOOP, STATIC)
QUICK = (*_ALONE, EAGER, LOOP)  # without what takes a minute to compile
# Of several rows: the persistent kernel serves few, and each contender has a cache of its own.
ALL_ROWS = (OURS, INT8, FP8, GENERATE, EAGER, TUNED, LOOP, STATIC)
QUICK_ROWS = (OURS, INT8, FP8, GENERATE, EAGER, LOOP)
# Seconds that must be left for a contender to begin: what compiling takes, and the rounds.
_NEEDS = {LOOP: 25.0, STATIC: 20.0}
_NEEDS_OTHERS = 4.0

Say = Callable[[str, float], None]


@dataclass(frozen=True)
class DecodeCase:
    """One model, batch and context, and who takes part.

    Attributes:
        sizes: fields of the configuration; empty for the preset of that name.
    """

    model: str
    batch: int
    context: int
    contenders: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...] = ()
    new_tokens: int = NEW_TOKENS

    @property
    def name(self) -> str:
        return f"decode {self.model} B{self.batch} after {self.context}"

    op = "decode"  # as the cases of the ops have it


_TINY = (
    ("n_layer", 1), ("n_embd", 32), ("n_head", 2), ("vocab_size", 97), ("n_positions", 48),
)  # fmt: skip


def decode_cases(scale: str) -> list[DecodeCase]:
    """The cases, those first that matter most.

    Args:
        scale: "full" (a GPU) or "tiny" (the interpreter).
    """
    if scale == "tiny":
        return [
            DecodeCase("tiny", 1, 1, ALL, _TINY, 2),
            DecodeCase("tiny", 2, 2, (OURS, FP8, LOOP), _TINY, 2),
        ]
    sizes = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    first = [DecodeCase("gpt2", 1, 512, ALL)]
    first += [DecodeCase(name, 1, 512, QUICK) for name in sizes[1:]]
    first += [DecodeCase("gpt2", 32, 512, ALL_ROWS)]
    first += [DecodeCase("gpt2", 1, context, QUICK) for context in (32, 1000)]
    first += [DecodeCase("gpt2", batch, 512, QUICK_ROWS) for batch in (8, 128)]
    first += [DecodeCase(name, 32, 512, QUICK_ROWS) for name in sizes[1:]]
    grid = [
        DecodeCase(name, batch, context, (OURS, *((PERSISTENT,) if batch == 1 else ()), INT8, LOOP))
        for context in (512, 32, 1000)
        for batch in (1, 8, 32, 128)
        for name in sizes
    ]
    names = {case.name for case in first}
    return [*first, *(case for case in grid if case.name not in names)]


def engine_generate(runner: TritonRunner) -> Generate:
    """Greedy decoding on a runner whose slots are all free, without the scheduler above it."""

    def generate(ids: Tensor, new_tokens: int) -> Tensor:
        batch, length = ids.shape
        steps = engine_steps(runner, ids, new_tokens)
        steps.prepare()
        steps.advance(new_tokens - 1)
        return runner.state.tokens[:batch, length : length + new_tokens].clone()

    return generate


def engine_steps(runner: TritonRunner, ids: Tensor, new_tokens: int) -> Steps:
    """The two parts of `engine_generate`."""
    (batch, length), state = ids.shape, runner.state
    slots = range(batch)

    def prepare() -> None:
        state.tokens[:batch, :length] = ids
        state.limits.fill_(length + new_tokens)
        state.status[:batch] = RUNNING
        for slot in slots:
            runner.prefill(slot, 0, length)

    return Steps(prepare, partial(runner.advance, slots, plain=True, context=length))


def rounded_model(model: Any, bits: int | None) -> Any:
    """A float32 copy of a model, with the values that its packed weights stand for."""
    exact = copy.deepcopy(model).float()
    if bits is None:
        return exact
    packed = pack(model, bits)
    with torch.no_grad():
        for i, block in enumerate(exact.transformer.h):
            for matrix, layer in (
                (packed.qkv, block.attn.c_attn),
                (packed.out, block.attn.c_proj),
                (packed.fc, block.mlp.c_fc),
                (packed.proj, block.mlp.c_proj),
            ):
                layer.weight.copy_(_layer(matrix, i).t())
        # The head alone is rounded, and not the embedding that it is tied to.
        exact.lm_head.weight = torch.nn.Parameter(_layer(packed.head, 0))
    return exact


def rounding_model(model: Any) -> Any:
    """A copy of a model that rounds its keys and values as a cache of float8 does."""
    model = copy.deepcopy(model)
    width = model.config.n_embd

    def rounded(module: torch.nn.Module, args: Any, qkv: Tensor) -> Tensor:
        return torch.cat((qkv[..., :width], to_float8(qkv[..., width:]).to(qkv.dtype)), -1)

    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(rounded)
    return model


def _layer(matrix: Matrix, i: int) -> Tensor:
    return dequantize(
        matrix.data[i], None if matrix.scale is None else matrix.scale[i], matrix.bits
    )


@torch.no_grad()
def shortfalls(exact: Any, plain: Any, ids: Tensor, chosen: Tensor) -> tuple[float, float]:
    """How far a choice lies below the best by the exact logits, at most, and how much may be.

    Args:
        exact, plain: the model in float32 and in the dtype of the contenders.
        ids, chosen: prompts ``[B, T]`` and what was generated behind them, ``[B, n]``.
    """
    rows = torch.cat((ids, chosen), 1)[:, :-1]
    keep = chosen.shape[1]
    with kernels.backend("torch"):
        oracle = exact(rows, logits_to_keep=keep).logits.float()
        other = plain(rows, logits_to_keep=keep).logits.float()
    short = oracle.amax(-1) - oracle.gather(-1, chosen[..., None]).squeeze(-1)
    # The best and the chosen logit may both be off by the budget.
    return float(short.max()), 2 * BUDGET * float((other - oracle).abs().max())


def step_bytes(weights: DecodeWeights, batch: int, context: float, element: int) -> int:
    """What a step reads: every matrix once, and every row's keys and values of so many bytes."""
    matrices = (weights.qkv, weights.out, weights.fc, weights.proj, weights.head)
    read = sum(m.data.nbytes + (0 if m.scale is None else m.scale.nbytes) for m in matrices)
    layers, width = weights.qkv.data.shape[0], weights.wte.shape[1]
    return int(read + 2 * batch * context * layers * width * element)


class _Contest:
    """The contenders of one case."""

    def __init__(
        self,
        case: DecodeCase,
        device: torch.device,
        say: Say,
        without: dict[str, str],
        dry: bool,
        deadline: float = float("inf"),
    ) -> None:
        self._case, self._say, self._dry, self._deadline = case, say, dry, deadline
        dtype = torch.float32 if dry else torch.bfloat16
        self.model = decode_peers.random_model(case.model, dict(case.sizes), dtype, device)
        vocab = self.model.config.vocab_size
        self.ids = torch.randint(vocab, (case.batch, case.context), device=device)
        self.new = min(case.new_tokens, self.model.config.n_positions - case.context)
        self.reports: dict[str, dict[str, Any]] = {name: {} for name in case.contenders}
        self.bytes: dict[str, int] = {}
        self.ready: dict[str, Generate] = {}
        # By what is rounded the float32 model and the contender's: one pair at a time.
        self._exact: dict[tuple[int | None, bool], tuple[Any, Any]] = {}
        self._runners: dict[str, TritonRunner] = {}
        self._steps: dict[str, Steps] = {}
        for name in case.contenders:
            if name in without:
                kind = "wrong" if name in ENGINES else "not measured"
                self.reports[name][kind] = without[name]
            elif name == FP8 and (reason := _no_float8(device)) is not None:
                self.reports[name]["not measured"] = reason
            elif name != OURS and time.time() + _NEEDS.get(name, _NEEDS_OTHERS) > deadline:
                self.reports[name]["not measured"] = "no time was left"
            else:
                self._prepare(name)
        self._exact.clear()

    def _prepare(self, name: str) -> None:
        self._say(f"provider {name}", _SILENCE_COMPILING)
        report = self.reports[name]
        begin = time.perf_counter()
        try:
            generate = self._built(name)
            chosen = generate(self.ids, self.new)
            report["ready_s"] = time.perf_counter() - begin
            if name in self._runners:
                report["driver"] = self._runners[name].served_by
            report |= self._judged(name, chosen)
            if not self._dry:
                # What comes twice is recorded in a graph; nothing is to be compiled in the rounds.
                for new in (self.new, 1, 1, self.new):
                    generate(self.ids, new).tolist()  # and is done
                report["warm_s"] = time.perf_counter() - begin
        except Exception as error:
            no_room = isinstance(error, OutOfMemory | torch.OutOfMemoryError)
            kind = "wrong" if name in ENGINES and not no_room else "not measured"
            lines = str(error).strip().splitlines() or ["?"]
            report[kind] = f"{type(error).__name__}: {lines[0]}"[:300]
            return
        if "wrong" not in report:
            self.ready[name] = generate

    def _built(self, name: str) -> Generate:
        model, case = self.model, self._case
        if name == GENERATE:
            return decode_peers.our_generate(model)
        if name == LOOP:
            context = case.context + self.new
            loop = decode_peers.CompiledLoop(model, case.batch, context, self._dry)
            self._steps[name] = Steps(partial(loop.prefill, self.ids), loop.advance)
            return loop.generate
        if name in (EAGER, TUNED, STATIC):
            activation = "gelu_pytorch_tanh" if name == TUNED else "gelu_new"
            theirs = decode_peers.transformers_model(model, activation)
            return decode_peers.transformers_generate(theirs, static=name == STATIC)
        bits = _BITS.get(name)
        driver = "persistent" if name == PERSISTENT else "graph" if name == OURS else "auto"
        runner = TritonRunner(
            model,
            case.batch,
            case.context + self.new,
            bits=bits,
            cache_dtype=FLOAT8 if name == FP8 else None,
            driver=driver,
        )
        self._runners[name] = runner
        context = case.context + self.new / 2
        element = 1 if name == FP8 else model.dtype.itemsize
        self.bytes[name] = step_bytes(runner.weights, case.batch, context, element)
        self._steps[name] = engine_steps(runner, self.ids, self.new)
        return engine_generate(runner)

    def _judged(self, name: str, chosen: Tensor) -> dict[str, Any]:
        if chosen.shape != (self._case.batch, self.new):
            return {"wrong": f"expected {self.new} tokens a row; got {list(chosen.shape)}"}
        key = _BITS.get(name), name == FP8
        if key not in self._exact:
            self._exact.clear()
            exact, same = rounded_model(self.model, key[0]), self.model
            if name == FP8:
                exact, same = rounding_model(exact), rounding_model(same)
            self._exact[key] = exact, same
        batch = self._case.batch
        rows = sorted({round(i * (batch - 1) / (_JUDGED_ROWS - 1)) for i in range(_JUDGED_ROWS)})
        short, allowed = shortfalls(*self._exact[key], self.ids[rows], chosen[rows].long())
        report: dict[str, Any] = {"shortfall": short, "allowed": allowed}
        if not short <= allowed + 1e-5:
            report["wrong"] = f"a token's logit is {short:.2e} below the best; {allowed:.2e} may be"
        return report

    def times(self) -> dict[str, dict[str, list[float]]]:
        """Seconds by contender: those of `whole_times`, and of `step_times` where there are any."""

        def begun(name: str) -> None:
            self._say(f"timing {name}", _SILENCE)

        samples = whole_times(self.ready, self.ids, self.new, begun, self._dry, self._deadline)
        for name in filter(self._steps.__contains__, self.ready):
            begun(f"steps of {name}")
            samples[name] |= step_times(self._steps[name], self.new, self._dry)
        return samples

    def close(self) -> None:
        for runner in self._runners.values():
            runner.close()


_BITS: dict[str, int | None] = {INT8: 8, INT4: 4}


def _no_float8(device: torch.device) -> str | None:
    """Why no cache of float8 can be there; None where it can."""
    try:
        check_device(FLOAT8, device)
    except ValueError as error:
        return str(error)
    return None


def measure_decode(
    case: DecodeCase,
    device: torch.device,
    say: Say,
    without: dict[str, str],
    dry_run: bool,
    deadline: float = float("inf"),
) -> dict[str, Any]:
    """The record of one case.

    Args:
        say: told what comes next, and how long at most until it is told again.
        without: contenders that broke an earlier attempt, with the reason.
        dry_run: compile nothing, time once.
        deadline: in the time of ``time.time``: who cannot be ready by then is left out.
    """
    say("model", _SILENCE)
    torch._dynamo.reset()
    torch.manual_seed(0)
    contest = _Contest(case, device, say, without, dry_run, deadline)
    try:
        samples = contest.times()
    finally:
        contest.close()
    wrong = [name for name in ENGINES if "wrong" in contest.reports.get(name, {})]
    return {
        "case": case.name,
        "op": case.op,
        "model": case.model,
        "batch": case.batch,
        "context": case.context,
        "new_tokens": contest.new,
        "status": "failed" if wrong else "measured",
        **({"reason": f"{wrong[0]}: {contest.reports[wrong[0]]['wrong']}"} if wrong else {}),
        "providers": contest.reports,
        "times": summary(samples, OURS, contest.bytes),
    }
