"""What is measured of models on a CPU, most important first: time may end."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeCase:
    """Greedy text: ``new`` tokens after ``prompt``, in turns of ``chunk``."""

    model: str
    company: str
    prompt: int
    new: int
    chunk: int = 16

    def __str__(self) -> str:
        return f"{self.model} {self.prompt}+{self.new} {self.company}"

    @property
    def turns(self) -> int:
        """How often each contender is asked: for the first token, then for every chunk."""
        return 1 - -(self.new - 1) // self.chunk


@dataclass(frozen=True)
class PrefillCase:
    """The first new token of ``batch`` prompts of ``prompt`` tokens, ``rounds`` times."""

    model: str
    company: str
    batch: int
    prompt: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.model} prefill {self.batch}x{self.prompt} {self.company}"

    @property
    def turns(self) -> int:
        """How often each contender is asked: to warm up, then every round."""
        return 1 + self.rounds


DECODE = [
    DecodeCase(model, company, prompt, new)
    for model in ("gpt2", "gpt2-medium")
    for company in ("float32", "smaller")
    for prompt, new in ((32, 129), (512, 65))
]
_ONE, _EIGHT = ((1, 512, 4), (1, 128, 6), (1, 1024, 3)), ((8, 128, 3), (8, 512, 2), (8, 1024, 2))
PREFILL = [
    PrefillCase(model, "prefill" if batch == 1 else "batches", batch, prompt, rounds)
    for model, shapes in (
        *(("gpt2", _ONE), ("gpt2-medium", _ONE)),
        *(("gpt2", _EIGHT[:2]), ("gpt2-medium", _EIGHT[:2])),
        *(("gpt2", _EIGHT[2:]), ("gpt2-medium", _EIGHT[2:])),
    )
    for batch, prompt, rounds in shapes
]
# Compiling takes minutes, so these are for whoever asks for them.
COMPILED_DECODE = [DecodeCase("gpt2", "compiled", 32, 129)]
COMPILED_PREFILL = [PrefillCase("gpt2", "compiled", 1, 128, 6)]


def quick_decode(model: str) -> DecodeCase:
    """That of the headline."""
    return DecodeCase(model, "quick", 32, 65, chunk=8)


def quick_prefill(model: str) -> PrefillCase:
    """That of the headline."""
    return PrefillCase(model, "quick", 1, 64 if model == "tiny" else 128, rounds=5)
