"""Sampling: transformers' processors, exact distributions, and seeds that reproduce."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gpt2fast import GPT2LMHeadModel
from gpt2fast.generation.sampling import (
    RandomRows,
    ban_repeated_ngrams,
    forbid,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
)

LARGE = 5000  # more tokens than are looked at first for a nucleus


def rows_of_scores(spread: float) -> Tensor:
    return torch.randn(7, LARGE) * spread


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("k", [1, 5, 50, LARGE, 2 * LARGE])
def test_top_k(spread: float, k: int) -> None:
    scores = rows_of_scores(spread)
    scores[0, :9] = scores[0].max()  # equal scores stand or fall together
    expected = transformers.TopKLogitsWarper(k)(None, scores)
    assert torch.equal(keep_top_k(scores, k), expected)


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p(spread: float, p: float) -> None:
    """Flat and peaked rows: nuclei of one token and of thousands."""
    scores = rows_of_scores(spread)
    scores[1] = keep_top_k(scores[1:2], 30)[0]  # as an earlier filter leaves it
    expected = transformers.TopPLogitsWarper(p)(None, scores)
    assert torch.equal(keep_top_p(scores, p), expected)


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.7, 1.0])
def test_min_p(spread: float, p: float) -> None:
    scores = rows_of_scores(spread)
    expected = transformers.MinPLogitsWarper(p)(None, scores)
    assert torch.equal(keep_min_p(scores, p), expected)


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty(penalty: float) -> None:
    ids, scores = torch.randint(0, LARGE, (7, 40)), rows_of_scores(2.0)
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    assert torch.equal(penalize_repetition(ids, scores, penalty), expected)
    leading = torch.tensor([0, 1, 5, 10, 20, 38, 39])
    padded = penalize_repetition(ids, scores, penalty, leading)
    for row, count in enumerate(leading.tolist()):
        kept = ids[row : row + 1, count:]
        alone = penalize_repetition(kept, scores[row : row + 1], penalty)
        assert torch.equal(padded[row], alone[0])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_repeat_ngram(size: int) -> None:
    ids, scores = torch.randint(0, 4, (7, 30)), rows_of_scores(2.0)
    for length in range(1, 31):
        expected = transformers.NoRepeatNGramLogitsProcessor(size)(ids[:, :length], scores)
        assert torch.equal(ban_repeated_ngrams(ids[:, :length], scores, size), expected)
    leading = torch.tensor([0, 1, 5, 10, 20, 28, 29])
    padded = ban_repeated_ngrams(ids, scores, size, leading)
    for row, count in enumerate(leading.tolist()):
        alone = ban_repeated_ngrams(ids[row : row + 1, count:], scores[row : row + 1], size)
        assert torch.equal(padded[row], alone[0])


def test_forbid() -> None:
    scores = rows_of_scores(1.0)
    expected = transformers.MinLengthLogitsProcessor(9, [3, 5])(torch.zeros(7, 8).long(), scores)
    assert torch.equal(forbid(scores, [3, 5]), expected)


def test_sample_inverts_the_distribution_function() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    scores = probabilities.log().expand(7, -1)
    last = math.nextafter(1.0, 0.0)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999, last], dtype=torch.float64)
    assert sample(scores, uniform).tolist() == [1, 1, 3, 3, 4, 4, 4]


def chi_square(counts: Counter[Any], probabilities: dict[Any, float], draws: int) -> float:
    assert set(counts) <= set(probabilities)
    return sum((counts[cell] - draws * p) ** 2 / (draws * p) for cell, p in probabilities.items())


@pytest.mark.parametrize(
    "keywords",
    [
        {"top_k": 8, "temperature": 1.3},
        {"top_k": 0, "top_p": 0.7, "temperature": 3.0},
        {"top_k": 0, "min_p": 0.2, "temperature": 2.0},
        {"top_k": 6, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_drawn_tokens_have_the_distribution(
    model: GPT2LMHeadModel, keywords: dict[str, Any]
) -> None:
    """Pearson's chi-square; the bound is exceeded by chance once in some 10,000 seeds."""
    draws = 5000
    ids = torch.randint(8, 97, (1, 4))
    output = model.generate(
        ids,
        do_sample=True,
        num_return_sequences=draws,
        max_new_tokens=1,
        seed=1,
        return_dict_in_generate=True,
        output_scores=True,
        **keywords,
    )
    exact = output.scores[0][0].double().softmax(-1)
    cells = {token: p for token, p in enumerate(exact.tolist()) if p > 0}
    assert 4 <= len(cells) <= 60
    freedom = len(cells) - 1
    # Wilson and Hilferty's approximation of the quantile at 3.72 standard deviations.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square(Counter(output.sequences[:, -1].tolist()), cells, draws) < bound


def test_drawn_pairs_have_the_distribution(model: GPT2LMHeadModel) -> None:
    """Two steps: the second token depends on the first as the model says, and on no other row."""
    draws = 5000
    ids = torch.randint(8, 97, (1, 4))
    keywords: dict[str, Any] = {"do_sample": True, "top_k": 3, "temperature": 2.0}
    tokens = model.generate(ids, num_return_sequences=draws, max_new_tokens=2, seed=5, **keywords)
    with torch.no_grad():
        first = (keep_top_k(model(ids).logits[:, -1], 3) / 2).softmax(-1)[0]
        cells = {}
        for a in first.nonzero()[:, 0].tolist():
            logits = model(torch.cat((ids, torch.tensor([[a]])), dim=1)).logits[:, -1]
            second = (keep_top_k(logits, 3) / 2).softmax(-1)[0]
            for b in second.nonzero()[:, 0].tolist():
                cells[a, b] = float(first[a] * second[b])
    counts = Counter(map(tuple, tokens[:, -2:].tolist()))
    assert chi_square(counts, cells, draws) < 31.8  # 8 degrees of freedom, one seed in 10,000


def test_streams_are_uniform_and_independent() -> None:
    rows = RandomRows([(0, 0), (0, 1), (1, 0), (2**64 - 1, 0)], torch.device("cpu"))
    drawn = torch.stack([rows.draw() for _ in range(4096)])
    assert ((drawn >= 0) & (drawn < 1)).all()
    # The mean of 4096 has a deviation of 0.0045, a correlation one of 0.0156.
    torch.testing.assert_close(drawn.mean(0), torch.full((4,), 0.5).double(), rtol=0, atol=0.02)
    correlation = torch.corrcoef(drawn.T) - torch.eye(4)
    assert correlation.abs().max() < 0.07
    alone = RandomRows([(0, 1)], torch.device("cpu"))
    assert torch.stack([alone.draw() for _ in range(200)])[:, 0].equal(drawn[:200, 1])


SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": []}


def test_seeds_repeat(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (2, 4))
    first = model.generate(ids, seed=3, **SAMPLED)
    torch.rand(5)  # no other random numbers have a part in it
    assert model.generate(ids, seed=3, **SAMPLED).equal(first)
    assert not model.generate(ids, seed=4, **SAMPLED).equal(first)
    assert not model.generate(ids, seed=-3, **SAMPLED).equal(first)
    assert not first[0, 4:].equal(first[1, 4:])


def test_a_seed_leaves_the_global_generator_alone(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (2, 4))
    state = torch.get_rng_state()
    model.generate(ids, seed=3, **SAMPLED)
    model.generate(ids, max_new_tokens=3)
    assert torch.get_rng_state().equal(state)


def test_manual_seed_repeats(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (2, 4))
    torch.manual_seed(9)
    first, second = model.generate(ids, **SAMPLED), model.generate(ids, **SAMPLED)
    torch.manual_seed(9)
    assert model.generate(ids, **SAMPLED).equal(first)
    assert not second.equal(first)


def test_generator_repeats(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (2, 4))
    generator = torch.Generator().manual_seed(9)
    first = model.generate(ids, generator=generator, **SAMPLED)
    second = model.generate(ids, generator=generator, **SAMPLED)
    generator.manual_seed(9)
    assert model.generate(ids, generator=generator, **SAMPLED).equal(first)
    assert not second.equal(first)


def test_a_rows_sample_is_its_own(model: GPT2LMHeadModel) -> None:
    """Whatever stands beside it, and whenever that ends."""
    ids = torch.randint(8, 97, (3, 4))
    keywords = {**SAMPLED, "max_new_tokens": 40, "eos_token_id": list(range(8, 20))}
    first = model.generate(ids, seed=3, **keywords)
    others = torch.cat((torch.randint(8, 97, (1, 4)), ids[1:2], torch.randint(8, 97, (2, 4))))
    second = model.generate(others, seed=3, **keywords)
    width = min(first.shape[1], second.shape[1])
    assert first[1, :width].tolist() == second[1, :width].tolist()
    reordered = model.generate(ids[[2, 0, 1]], seed=[6, 4, 5], **keywords)
    expected = model.generate(ids, seed=[4, 5, 6], **keywords)
    assert reordered.equal(expected[[2, 0, 1]])


def test_custom_processor_comes_before_the_temperature(model: GPT2LMHeadModel) -> None:
    seen = []

    def only_even(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids.shape[1])
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, -torch.inf)

    ids = torch.randint(8, 97, (2, 4))
    output = model.generate(
        ids,
        logits_processor=[only_even],
        temperature=2.0,
        top_k=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **SAMPLED,
    )
    assert (output.sequences[:, 4:] % 2 == 0).all()
    assert seen == list(range(4, 16))
    assert torch.equal(output.scores[0][:, ::2], output.logits[0][:, ::2] / 2)
