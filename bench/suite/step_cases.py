"""What is measured of whole models: steps of training, prompts, scoring and generation.

One table serves the GPU suite and the benchmarks on a CPU. A case names its contenders; ratios are
to the first, which is ours.
"""

from dataclasses import dataclass, replace
from typing import Any

from gpt2fast.config import PRESETS, GPT2Config

OURS, OURS_COMPILED = "gpt2fast", "gpt2fast compiled"
EAGER, SDPA, TUNED = "transformers eager", "transformers SDPA", "transformers tuned"
COMPILED = "transformers compiled"
PLAIN_COMPILED = "short program compiled"
SORTED = "transformers SDPA, sorted"
ACCELERATED, ACCELERATED_COMPILED = "accelerated", "accelerated compiled"
OF_OURS = (OURS, OURS_COMPILED, ACCELERATED, ACCELERATED_COMPILED)
COMPILING = (OURS_COMPILED, COMPILED, PLAIN_COMPILED, ACCELERATED_COMPILED)

TRAINING, PREFILL, SCORING, ACCELERATE = "training", "prefill", "scoring", "accelerate"
STEP_PARTS = (TRAINING, PREFILL, SCORING, ACCELERATE)
GENERATE, PERPLEXITY = "generate", "perplexity"

# A model for the interpreter and for tests.
TINY = (
    ("n_layer", 1), ("n_embd", 64), ("n_head", 2), ("vocab_size", 97), ("n_positions", 32),
)  # fmt: skip


@dataclass(frozen=True)
class StepCase:
    """One step of one model, and who takes part.

    Attributes:
        part: of the suite.
        kind: what a step is: see `bench.suite.steps`.
        batch, length: of its ids; with ``mixed``, of so many texts of up to that length.
        contenders: the first is the one of ours that the others are compared with.
        sizes: fields of the configuration; empty for the preset of that name.
        seconds: that it may take on an H100, everything included: it is not begun with less left.
        rounds: on a CPU, how often each is timed.
    """

    part: str
    kind: str
    model: str
    batch: int
    length: int
    contenders: tuple[str, ...]
    mixed: bool = False
    sizes: tuple[tuple[str, int], ...] = ()
    new_tokens: int = 64
    seconds: float = 0.0
    rounds: int = 3

    @property
    def name(self) -> str:
        kind = self.kind if self.kind == self.part else f"{self.part} {self.kind}"
        shape = f"B{self.batch} T{self.length}{' mixed' if self.mixed else ''}"
        compiled = " compiled" if set(self.contenders) & set(COMPILING) else ""
        return f"{kind} {self.model} {shape}{compiled}"

    @property
    def op(self) -> str:
        """As the cases of the ops have it."""
        return self.part

    def fields(self) -> dict[str, Any]:
        """Of the configuration. Without dropout: everybody computes the same."""
        without = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        return {**(dict(self.sizes) or PRESETS[self.model]), **without}

    def lengths(self) -> list[int]:
        """Tokens of each row; mixed ones are spread evenly over powers of two, in no order."""
        if not self.mixed:
            return [self.length] * self.batch
        steps = [(7 * i % self.batch + 1) / self.batch for i in range(self.batch)]
        return [max(2, round(self.length ** (0.5 + 0.5 * step))) for step in steps]

    @property
    def tokens(self) -> int:
        """That a step reads, padding left out."""
        return sum(self.lengths())

    @property
    def flops(self) -> int:
        """Of the matrix products and causal attention; a training step does three times a
        forward pass."""
        config = GPT2Config(**self.fields())
        width, layers, vocab = config.n_embd, config.n_layer, config.vocab_size
        predicted = self.batch if self.kind == PREFILL else self.tokens
        rows = 24 * layers * width**2 * self.tokens + 2 * width * vocab * predicted
        attention = sum(2 * layers * width * n * (n + 1) for n in self.lengths())
        return (3 if self.kind == TRAINING else 1) * (rows + attention)


_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_QUICK = (OURS, SDPA, TUNED, EAGER)
_COMPILED = (OURS, OURS_COMPILED, PLAIN_COMPILED, COMPILED)
_ITSELF = (ACCELERATED, SDPA, EAGER)


def _prefill(model: str, batch: int, length: int, seconds: float = 6) -> StepCase:
    return StepCase(PREFILL, PREFILL, model, batch, length, _QUICK, seconds=seconds)


def _accelerate(kind: str, batch: int, length: int, compiled: bool, seconds: float) -> StepCase:
    names = (ACCELERATED, COMPILED) if compiled else _ITSELF
    if compiled and kind == TRAINING:
        names = (ACCELERATED, ACCELERATED_COMPILED, COMPILED)
    return StepCase(ACCELERATE, kind, "gpt2", batch, length, names, seconds=seconds)


_CPU_STEP = (OURS, SDPA, TUNED, EAGER, ACCELERATED)
_CPU_ITSELF = (ACCELERATED, f"{ACCELERATED} again", SDPA, EAGER)
# part, kind, model, batch, length, contenders, other fields: what matters most comes first.
_CPU: tuple[Any, ...] = (
    (TRAINING, TRAINING, "gpt2", 1, 512, (*_CPU_STEP, f"{OURS} again"), {"rounds": 3}),
    (TRAINING, TRAINING, "gpt2", 4, 512, (OURS, SDPA, TUNED), {"rounds": 2}),
    (TRAINING, TRAINING, "gpt2", 1, 256, _CPU_STEP, {"rounds": 3}),
    (TRAINING, TRAINING, "gpt2", 4, 256, (OURS, SDPA, TUNED), {"rounds": 2}),
    (
        *(SCORING, SCORING, "gpt2", 24, 512, (OURS, f"{OURS} again", SDPA, SORTED)),
        {"rounds": 2, "mixed": True},
    ),
    (SCORING, SCORING, "gpt2", 16, 1024, (OURS, SDPA), {"rounds": 1}),
    (ACCELERATE, TRAINING, "gpt2", 1, 256, _CPU_ITSELF, {"rounds": 4}),
    (ACCELERATE, PREFILL, "gpt2", 1, 512, _CPU_ITSELF, {"rounds": 5}),
    (ACCELERATE, GENERATE, "gpt2", 1, 32, _CPU_ITSELF, {"rounds": 4, "new_tokens": 32}),
    (ACCELERATE, PERPLEXITY, "gpt2", 1, 512, _CPU_ITSELF, {"rounds": 4}),
)
_CPU_COMPILED: tuple[Any, ...] = (
    (TRAINING, TRAINING, "gpt2", 1, 256, (OURS, PLAIN_COMPILED, COMPILED, SDPA), {"rounds": 3}),
    (ACCELERATE, TRAINING, "gpt2", 1, 256, (ACCELERATED, COMPILED, SDPA), {"rounds": 3}),
)
_CPU_QUICK: tuple[Any, ...] = (
    (TRAINING, TRAINING, "gpt2", 1, 128, (OURS, SDPA), {"rounds": 2}),
    (SCORING, SCORING, "gpt2", 8, 128, (OURS, SDPA), {"rounds": 2, "mixed": True}),
    (ACCELERATE, TRAINING, "gpt2", 1, 128, (ACCELERATED, SDPA), {"rounds": 2}),
)


def step_cases(scale: str) -> list[StepCase]:
    """The cases of all parts in the order in which they are measured: first what nobody compiles,
    one of each part at least, then what takes a compiler's minutes, then the grids.

    Args:
        scale: "full" (a GPU) or "tiny" (the interpreter).
    """
    if scale == "tiny":
        return _tiny()
    first = [
        StepCase(TRAINING, TRAINING, "gpt2", 16, 1024, _QUICK, seconds=14),
        _prefill("gpt2", 8, 512),
        _prefill("gpt2", 1, 512),
        StepCase(SCORING, SCORING, "gpt2", 16, 1024, _QUICK, seconds=8),
        StepCase(SCORING, SCORING, "gpt2", 64, 1024, (OURS, SDPA, SORTED), True, seconds=8),
        _accelerate(TRAINING, 16, 1024, False, 12),
        _accelerate(PREFILL, 8, 512, False, 5),
        _accelerate(GENERATE, 1, 512, False, 12),
        _accelerate(PERPLEXITY, 16, 1024, False, 5),
    ]
    compiled = [
        StepCase(TRAINING, TRAINING, "gpt2", 16, 1024, _COMPILED, seconds=90),
        StepCase(PREFILL, PREFILL, "gpt2", 8, 512, _COMPILED, seconds=45),
        _accelerate(TRAINING, 16, 1024, True, 60),
        StepCase(SCORING, SCORING, "gpt2", 16, 1024, (OURS, COMPILED), seconds=25),
    ]
    grid = [
        _prefill(model, batch, length, 6 if model != "gpt2-xl" else 12)
        for model in _SIZES
        for length in (1024, 128, 512)
        for batch in (8, 1)
        if (model, length) != ("gpt2", 512)
    ]
    last = [
        StepCase(PREFILL, PREFILL, "gpt2", 1, 512, _COMPILED, seconds=45),
        _accelerate(PREFILL, 8, 512, True, 25),
        _accelerate(GENERATE, 1, 512, True, 60),
        _accelerate(PERPLEXITY, 16, 1024, True, 25),
        StepCase(TRAINING, TRAINING, "gpt2", 4, 1024, _QUICK, seconds=8),
    ]
    return [*first, *compiled, *grid, *last]


def cpu_cases(part: str, scale: str) -> list[StepCase]:
    """Those of a benchmark on a CPU, in float32.

    Args:
        scale: "full"; "compiled", which takes a compiler's minutes; "quick"; or "tiny".
    """
    if scale == "tiny":
        own = [case for case in _tiny() if case.part == part]
        return [replace(case, contenders=_beside(case.contenders), rounds=1) for case in own]
    rows = {"full": _CPU, "compiled": _CPU_COMPILED, "quick": _CPU_QUICK}[scale]
    return [StepCase(*row[:6], **row[6]) for row in rows if row[0] == part]


def _beside(contenders: tuple[str, ...]) -> tuple[str, ...]:
    """With ours again and the base, and without those that compile."""
    ours, *others = (name for name in contenders if name not in COMPILING)
    return tuple(dict.fromkeys((ours, again(ours), *others, SDPA)))


def again(name: str) -> str:
    """The same contender once more: what differs is noise."""
    return f"{name} again"


def _tiny() -> list[StepCase]:
    def case(
        part: str, kind: str, names: tuple[str, ...], batch: int = 2, mixed: bool = False
    ) -> StepCase:
        return StepCase(part, kind, "tiny", batch, 8, names, mixed, TINY, new_tokens=3)

    return [
        case(TRAINING, TRAINING, (OURS, SDPA, PLAIN_COMPILED)),
        case(PREFILL, PREFILL, (OURS, TUNED)),
        case(SCORING, SCORING, (OURS, SDPA, SORTED), 3, True),
        *(
            case(ACCELERATE, kind, (ACCELERATED, EAGER))
            for kind in (TRAINING, PREFILL, GENERATE, PERPLEXITY)
        ),
    ]
