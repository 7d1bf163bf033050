"""No answer is timed that is right in the warm-up alone, or by the logits alone."""

from contextlib import closing
from typing import Any

import pytest

from gpt2fast.benchmark import contest, table
from gpt2fast.benchmark.contest import PrefillCase
from gpt2fast.benchmark.processes import Failed
from tests.bench.test_cpu import Fake, company, decoded


class Forgetful(Fake):
    """Right logits, and a cache that makes it generate something else."""

    def generate(self, prompt: list[int], new: int, on_token: Any) -> None:
        super().generate(prompt, new, lambda token: on_token(token + 20))


def test_fewer_bits_must_choose_by_their_own_logits() -> None:
    report = decoded(base=Fake(), **{table.BARE: Fake(), "gpt2fast int8": Forgetful()})
    found = report["contenders"]["gpt2fast int8"]
    assert "tokens are not the likeliest of its own logits" in found["wrong"]
    assert "seconds" not in found
    assert "seconds" in report["contenders"][table.BARE]


class Turning(Fake):
    """Right in the warm-up alone, or the reference that then fails."""

    def prefill(self, rows: list[list[int]]) -> list[int]:
        tokens, self.token = super().prefill(rows), 8
        if self.error == "later" and self.now > self.seconds:
            raise RuntimeError("out of memory")
        return tokens


def test_every_prompt_is_checked() -> None:
    case, names = PrefillCase("tiny", "prefill", 1, 6, 2), (table.BASE, table.OURS)
    with closing(company((table.BASE, Fake(0.02)), (table.OURS, Turning(0.01)))) as there:
        assert "wrong" in contest.prefill(case, names, there)["contenders"][table.OURS]
    named = ((table.BASE, Turning(0.02, error="later")), (table.OURS, Fake(0.01)))
    with closing(company(*named)) as there, pytest.raises(Failed, match="the reference:"):
        contest.prefill(case, names, there)
