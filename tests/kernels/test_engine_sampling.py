"""Choosing tokens on the device against its definition in torch, and against a slow oracle."""

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast.engine.sampling import select_and_commit
from gpt2fast.engine.speculation import PromptLookup
from gpt2fast.kernels._triton.engine import configs, sampling
from gpt2fast.kernels.decode_state import (
    BROKEN,
    EOS,
    IDLE,
    LIMIT,
    RUNNING,
    DecodeState,
)
from gpt2fast.kernels.decode_step import StepBuffers
from tests.kernels.devices import DEVICE

V, CAPACITY, BLOCK, CANDIDATES = 250, 20, 128, 16
JUST_BELOW_ONE = 1 - 2.0**-53
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a row, and fewer candidates than many settings keep."""
    monkeypatch.setattr(configs, "ENGINE_SELECT", configs.SelectConfig(BLOCK, CANDIDATES, 4))
    monkeypatch.setattr(configs, "ENGINE_PROPOSE_BLOCK", 16)


def make_state(slots: int, vocab_size: int = V, seed: int = 0, **settings: Any) -> DecodeState:
    """Running slots of random tokens, with room; a setting is a value, or one for each slot."""
    generator = torch.Generator().manual_seed(seed)
    state = DecodeState.empty(slots, CAPACITY, vocab_size, torch.device("cpu"))
    state.lengths.copy_(torch.randint(2, 8, (slots,), generator=generator))
    state.tokens.random_(0, vocab_size, generator=generator)
    for slot in range(slots):
        state.seen[slot, state.tokens[slot, : state.lengths[slot] + 1]] = 1
    state.uniforms.copy_(torch.rand(state.uniforms.shape, generator=generator).double())
    state.limits.fill_(CAPACITY + 1)
    state.status.fill_(RUNNING)
    state.scored.fill_(1)
    for name, value in settings.items():
        getattr(state, name).copy_(torch.as_tensor(value))
    return DecodeState(**{f.name: getattr(state, f.name).to(DEVICE) for f in fields(state)})


def shares(logits: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the head leaves of each of so many shares of the rows; the last one is empty."""
    parts = logits.chunk(number - 1, 1)
    value = torch.stack([torch.where(p.isnan(), -INF, p).amax(1) for p in parts], 1)
    first = [int(sum(p.shape[1] for p in parts[:i])) for i in range(len(parts))]
    index = [(p == v[:, None]).int().argmax(1) for p, v in zip(parts, value.T, strict=True)]
    total = [(p - v[:, None]).exp().sum(1) for p, v in zip(parts, value.T, strict=True)]
    empty = torch.zeros(len(logits), 1, device=DEVICE)
    return (
        torch.cat((value, empty - INF), 1),
        torch.cat((torch.stack(index, 1) + torch.tensor(first, device=DEVICE), empty), 1).int(),
        torch.cat((torch.stack(total, 1), empty), 1),
    )


def step(
    state: DecodeState, slots: list[int], logits: Tensor, drafts: int = 0, greedy: bool = False
) -> None:
    """Choose and commit on the device, for slots (-1: none) with so many drafts each."""
    rows = len(slots) * (drafts + 1)
    table = {"dtype": torch.int32, "device": DEVICE}
    best = shares(logits, 4) if greedy else (torch.empty(0),) * 3
    used: dict[str, Any] = {
        "splits": 1,
        "slots": torch.tensor([s for s in slots for _ in range(drafts + 1)], **table),
        "offsets": torch.tensor(list(range(drafts + 1)) * len(slots), **table),
        "logits": torch.full_like(logits, NAN) if greedy else logits,
        "best_value": best[0],
        "best_index": best[1],
        "best_sum": best[2],
        "chosen": torch.full((rows,), -7, device=DEVICE),
        "chosen_log_probs": torch.full((rows,), NAN, device=DEVICE),
        "scores": torch.full_like(logits, NAN),
        "candidates": torch.full((rows, CANDIDATES), -1, device=DEVICE),
    }
    unused = {f.name: torch.empty(0) for f in fields(StepBuffers) if f.name not in used}
    before = logits.clone()
    sampling.launch_select(state, StepBuffers(**used, **unused), drafts, greedy)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


def assert_same(actual: DecodeState, expected: DecodeState) -> None:
    for f in fields(DecodeState):
        found, wanted = getattr(actual, f.name), getattr(expected, f.name)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=f.name)


def check(state: DecodeState, logits: Tensor, drafts: int = 0, greedy: bool = False) -> DecodeState:
    """Steps all slots; the state must become what the definition makes of it."""
    expected = copy.deepcopy(state)
    slots = list(range(len(state.status)))
    select_and_commit(expected, slots, drafts, logits)
    step(state, slots, logits, drafts, greedy)
    assert_same(state, expected)
    return state


def random_logits(rows: int, spread: float = 2.0, vocab_size: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, vocab_size, generator=generator) * spread).to(DEVICE)


# temperature, top_k, top_p, min_p, penalty of a slot each. Among 16 candidates a list is sure to
# hold a top-k of 8; nuclei of these logits have up to 250 tokens.
SETTINGS = {
    "greedy and plain": [
        (0, 0, 1, 0, 1),
        (0, 0, 1, 0, 1.5),
        (1, 0, 1, 0, 1),
        (0.3, 0, 1, 0, 2),
        (0, 5, 0.5, 0.1, 1),
        (1, V, 1, 0, 0.5),
    ],
    "few": [
        (1, 1, 1, 0, 1),
        (1, 5, 1, 0, 1),
        (0.7, 8, 0.9, 0, 1.3),
        (1, 0, 0.3, 0, 1),
        (1, 0, 1e-6, 0, 1),
        (1, 7, 0.6, 0.3, 1),
    ],
    "many": [
        (1, 30, 1, 0, 1),
        (1.5, 0, 0.95, 0, 1),
        (2, 150, 0.9, 0, 1),
        (2, 0, 0.999, 0.01, 1.2),
    ],
    "least likely": [
        (1, 0, 1, 0.1, 1),
        (1, 0, 1, 1, 1),
        (0.01, 0, 1, 0, 1),
        (100, 0, 1, 0.97, 1),
        (1e30, 3, 1, 0, 1),
        (1e-30, 3, 0.5, 0, 1),
    ],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    """Each slot of a step has its own."""
    columns = zip(*SETTINGS[name], strict=True)
    names = ("temperature", "top_k", "top_p", "min_p", "penalty")
    state = make_state(len(SETTINGS[name]), **dict(zip(names, columns, strict=True)))
    check(state, random_logits(len(SETTINGS[name])))


def test_many_random_numbers() -> None:
    """Both ends, and in between; what is drawn is spread over the vocabulary."""
    uniforms = torch.linspace(0, 1, 10).double()
    uniforms[-1] = JUST_BELOW_ONE
    logits = random_logits(1).repeat(10, 1)
    logits[:, :2] = -INF  # of no probability, though a random number may be 0
    state = make_state(10, temperature=1, top_k=7, uniforms=uniforms[:, None])
    check(state, logits)
    places = torch.arange(10, device=DEVICE), state.lengths.long()
    assert state.tokens[places].unique().numel() >= 4
    state = make_state(10, temperature=1.5, uniforms=uniforms[:, None])
    check(state, logits)
    assert state.tokens[places].unique().numel() >= 8


def kept(logits: Tensor, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The tokens that are kept, of equal ones the first first; slow, in float64."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    order = [i for i in order if logits[i] > -INF]
    if top_k:
        least = float(logits[order[min(top_k, len(order)) - 1]])
        order = [i for i in order if float(logits[i]) >= least]
    p = torch.softmax(logits[order].double(), 0).tolist()
    if top_p < 1:
        number = next(n for n in range(1, len(p) + 1) if sum(p[:n]) >= top_p - 1e-9)
        order, p = order[:number], p[:number]
    order = [i for i, value in zip(order, p, strict=True) if value >= min_p * p[0]]
    return sorted(order)


def levels(*counts: int) -> Tensor:
    """Logits of so many tokens each at 0, -1, -2, ..., mixed; the others are ruled out."""
    values = [-float(level) for level, n in enumerate(counts) for _ in range(n)]
    values += [-INF] * (V - len(values))
    mixed = torch.randperm(V, generator=torch.Generator().manual_seed(1))
    return torch.tensor(values)[mixed].to(DEVICE)


@pytest.mark.parametrize(
    ("logits", "settings"),
    [
        (levels(V), (5, 1.0, 0.0)),
        (levels(V), (0, 0.5, 0.0)),
        (levels(3, 60, 100), (100, 0.7, 0.0)),
        (levels(3, 5, 100), (6, 0.8, 0.0)),
        (levels(3, 60, 100), (0, 1.0, 0.3)),
        (levels(1), (50, 0.9, 0.1)),
        (levels(2, 1, 30), (0, 0.9999, 0.0)),
        (levels(2, 0, 0, 9), (200, 1.0, 0.0)),
    ],
)
def test_equal_scores(logits: Tensor, settings: tuple[int, float, float]) -> None:
    """Top-k keeps all that equal the k-th, top-p as many as it takes, the first ones."""
    tokens = kept(logits.cpu(), *settings)
    p = torch.softmax(logits[tokens].double(), 0).cpu()
    looked_at = sorted({len(tokens) // 3, len(tokens) - 1})
    # The middle of what belongs to each of these tokens.
    uniforms = (p.cumsum(0) - p / 2)[looked_at]
    names = ("top_k", "top_p", "min_p")
    state = make_state(
        len(looked_at),
        temperature=1.0,
        uniforms=uniforms[:, None],
        **dict(zip(names, settings, strict=True)),
    )
    step(state, list(range(len(looked_at))), logits.repeat(len(looked_at), 1))
    places = torch.arange(len(looked_at), device=DEVICE), state.lengths.long()
    assert state.tokens[places].tolist() == [tokens[i] for i in looked_at]


@pytest.mark.parametrize("greedy", [True, False])
def test_best_of_equals_is_the_first(greedy: bool) -> None:
    logits = random_logits(4)
    logits[0, [5, 249]] = 30.0
    logits[1, [140, 141]] = 30.0
    logits[2] = -1.0
    logits[3] = -5.0
    logits[3, [249, 248]] = torch.tensor([0.0, -0.0], device=DEVICE)
    state = check(make_state(4), logits, greedy=greedy)
    places = torch.arange(4, device=DEVICE), state.lengths.long()
    assert state.tokens[places].tolist() == [5, 140, 0, 248]


@pytest.mark.parametrize("greedy", [True, False])
def test_no_finite_score(greedy: bool) -> None:
    logits = random_logits(4)
    logits[0, 7] = NAN
    logits[1] = -INF
    logits[2, 249] = INF
    temperature = [0.0] * 4 if greedy else [0.0, 1.0, 1.0, 1.0]
    state = make_state(4, temperature=temperature)
    before = copy.deepcopy(state)
    check(state, logits, greedy=greedy)
    assert state.status.tolist() == [BROKEN] * 3 + [RUNNING]
    assert torch.equal(state.tokens[:3], before.tokens[:3])


def test_only_running_slots_change() -> None:
    state = make_state(6, temperature=1.0, status=[IDLE, RUNNING, EOS, LIMIT, BROKEN, RUNNING])
    expected = copy.deepcopy(state)
    logits = random_logits(6)
    select_and_commit(expected, [0, 1, 2, 3, 4], 0, logits[1:])
    step(state, [-1, 0, 1, 2, 3, 4], logits)  # slot 5 runs, but not in this step
    assert_same(state, expected)
    assert torch.equal(state.tokens[5], expected.tokens[5])


def test_log_probs_only_where_asked_for() -> None:
    state = make_state(3, temperature=[0.0, 1.0, 0.7], scored=[1, 0, 1], penalty=1.2)
    state.log_probs.fill_(5.0)
    check(state, random_logits(3))
    assert bool((state.log_probs[1] == 5.0).all())


def test_least_length_and_ends() -> None:
    """Ids of eos are forbidden before ``least`` tokens, and end the sequence afterwards."""
    logits = random_logits(4)
    logits[:, 11], logits[:, 12] = 40.0, 39.0
    eos = [[11, 12] + [-1] * 6] * 3 + [[-1] * 8]
    state = make_state(4, lengths=5, least=[7, 6, 0, 9], eos=eos, temperature=[0.0, 0.0, 1.0, 0.0])
    check(state, logits)
    assert state.status.tolist() == [RUNNING, EOS, EOS, RUNNING]
    assert state.tokens[0, 6] not in (11, 12)


def test_limits() -> None:
    state = check(
        make_state(3, lengths=[5, 5, CAPACITY - 1], limits=[7, 8, CAPACITY + 1]),
        random_logits(3),
        greedy=True,
    )
    assert state.status.tolist() == [LIMIT, RUNNING, LIMIT]


@pytest.mark.parametrize("greedy", [True, False])
def test_drafts(greedy: bool) -> None:
    """All accepted, none, some, an end or the limit among them, a broken row behind some."""
    drafts, length, slots = 3, 5, 7
    logits = random_logits(slots * (drafts + 1))
    settings: dict[str, Any] = {"lengths": length, "limits": [21, 21, 21, 21, 8, 21, 21]}
    if not greedy:
        settings |= {"temperature": [1.0, 0.0] * 3 + [1.0], "penalty": 1.3, "least": 8, "top_k": 8}
    eos = torch.full((slots, 8), -1)
    state = make_state(slots, **settings)
    rows = drafts + 1
    logits[6 * rows + 2] = NAN
    # Under a penalty the first of these cannot come twice.
    logits[5 * rows : 5 * rows + 2, [77, 78]] = torch.tensor([10.0, 9.0], device=DEVICE)
    # What would be chosen one by one: the drafts are made of it.
    chosen = copy.deepcopy(state)
    for j in range(rows):
        one = logits[j::rows].clone()
        chosen.status.fill_(RUNNING)
        chosen.limits.fill_(21)
        select_and_commit(chosen, list(range(slots)), 0, one)
        chosen.lengths.fill_(length + j + 1)
    right = chosen.tokens[:, length + 1 : length + rows]
    state.tokens[:, length + 1 : length + rows] = right
    state.tokens[1, length + 1] = (right[1, 0] + 1) % V
    state.tokens[2, length + 3] = (right[2, 2] + 1) % V
    eos[3, 4] = right[3, 1]
    state.eos.copy_(eos)
    state.least[3] = 0
    check(state, logits, drafts, greedy)
    assert state.lengths.tolist() == [9, 6, 8, 7, 7, 9, 7]
    assert state.status.tolist() == [RUNNING, RUNNING, RUNNING, EOS, LIMIT, RUNNING, BROKEN]


def test_rows_that_make_no_group_are_ignored() -> None:
    """A step of 8 rows for two slots of 3; the last two rows have no slot."""
    state, logits = make_state(2), random_logits(6)
    expected = copy.deepcopy(state)
    select_and_commit(expected, [0, 1], 2, logits)
    padded = torch.cat((logits, logits[:3]))
    step(state, [0, 1, -1], padded, 2, greedy=True)
    assert_same(state, expected)


def test_drafts_at_the_end_of_the_capacity() -> None:
    state = make_state(2, lengths=CAPACITY - 1, temperature=[0.0, 1.0])
    check_rows = random_logits(8)
    expected = copy.deepcopy(state)
    for slot in (0, 1):
        select_and_commit(expected, [slot], 0, check_rows[4 * slot : 4 * slot + 1])
    step(state, [0, 1], check_rows, 3)
    assert_same(state, expected)


@pytest.mark.parametrize("sampled", [False, True])
def test_speculation_changes_no_token(sampled: bool) -> None:
    """A model of bigrams: with drafts and without them the same sequences come out."""
    size = 12
    table = random_logits(size, 3.0, size)
    plain = make_state(2, size, lengths=4, limits=[17, 12], temperature=float(sampled), top_k=6)
    drafted, steps = copy.deepcopy(plain), 0
    while bool((plain.status == RUNNING).any()):
        newest = plain.tokens[[0, 1], plain.lengths.long()]
        step(plain, [0, 1], table[newest])
    while bool((drafted.status == RUNNING).any()):
        propose(drafted, [0, 1], 2)
        places = drafted.lengths.long()[:, None] + torch.arange(3, device=DEVICE)
        newest = drafted.tokens.gather(1, places.clamp_max(CAPACITY)).flatten()
        step(drafted, [0, 1], table[newest], 2)
        steps += 1
    assert steps < 12
    for slot, limit in enumerate((17, 12)):
        assert torch.equal(drafted.tokens[slot, :limit], plain.tokens[slot, :limit])
    torch.testing.assert_close(drafted.log_probs, plain.log_probs)
    assert torch.equal(drafted.seen, plain.seen)
    assert torch.equal(drafted.lengths, plain.lengths)


def propose(state: DecodeState, slots: list[int], drafts: int, ngram: int = 3) -> None:
    table = torch.tensor([s for s in slots for _ in range(drafts + 1)], dtype=torch.int32)
    unused = {f.name: torch.empty(0) for f in fields(StepBuffers) if f.name != "slots"}
    buffers = StepBuffers(slots=table.to(DEVICE), **unused)  # type: ignore[arg-type]
    sampling.launch_propose(state, buffers, drafts, ngram)


def test_proposals() -> None:
    """Those of the engine's prompt lookup; where it has none, the newest token again."""
    slots, drafts = 12, 4
    state = make_state(slots, 3, lengths=[0, 1, 2, 3, 5, 7, 9, 11, 13, 17, 19, 9])
    state.tokens[5, :8] = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])  # overlaps its end
    state.tokens[6, :10] = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 1])  # no match
    state.status[11] = EOS
    before = state.tokens.clone()
    propose(state, [*range(slots), -1], drafts)
    for slot in range(slots - 1):
        count = int(state.lengths[slot]) + 1
        tokens = before[slot, :count].tolist()
        expected = PromptLookup(tokens, drafts, 3).propose(drafts) or tokens[-1:] * drafts
        room = min(drafts, CAPACITY + 1 - count)
        assert state.tokens[slot, :count].tolist() == tokens
        assert state.tokens[slot, count : count + room].tolist() == expected[:room]
        assert torch.equal(state.tokens[slot, count + room :], before[slot, count + room :])
    assert torch.equal(state.tokens[-1], before[-1])
