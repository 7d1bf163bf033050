"""The runner on PyTorch's operators, on a CPU: the plain model's tokens, whoever else is there."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast.engine import cpu_linear, torch_runner
from gpt2fast.engine.torch_runner import TorchRunner
from gpt2fast.kernels.decode_state import IDLE, LIMIT, RUNNING
from tests.engine import runners
from tests.engine.runners import VOCAB, fill, plain, start, tokens
from tests.models.reference import pair
from tests.tolerances import assert_close

CAPACITY = 48


def tiny(**overrides: Any) -> Any:
    return runners.tiny(**overrides).cpu()


def prompt(length: int) -> Tensor:
    return torch.randint(1, VOCAB, (length,))


def runner_of(model: Any, slots: int = 4, capacity: int = CAPACITY) -> TorchRunner:
    """A runner whose cache is poisoned: reading what nobody wrote shows."""
    runner = TorchRunner(model, slots, capacity)
    runner._cache.fill_(float("nan"))
    return runner


def finish(runner: TorchRunner, slots: list[int], steps: int = CAPACITY) -> None:
    runner.advance(slots, steps)
    assert not any(runner.state.status[slot] == RUNNING for slot in slots)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return tiny()


@pytest.mark.parametrize("length", [1, 2, 17])
def test_greedy_tokens_are_those_of_transformers(length):
    ours, reference = pair(n_embd=64, n_positions=CAPACITY, std=0.3)
    runner = runner_of(ours, slots=1)
    ids = prompt(length)
    start(runner, 0, ids, 24)
    finish(runner, [0])
    expected = reference.generate(
        ids[None], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert tokens(runner, 0) == expected[0].tolist()
    assert runner.state.status[0] == LIMIT


def test_a_ragged_batch_gives_everybody_what_they_get_alone(model):
    prompts = [prompt(n) for n in (9, 1, 14, 5)]
    runner = runner_of(model)
    for slot, ids in enumerate(prompts):
        start(runner, slot, ids, 12)
    finish(runner, [2, 0, 3, 1])
    for slot, ids in enumerate(prompts):
        assert tokens(runner, slot) == plain(model, ids, 12)


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 0], [0, 2, 3]])
def test_rows_of_one_length_are_attended_to_at_once(model, slots):
    prompts = {slot: prompt(7) for slot in slots}
    runner = runner_of(model)
    for slot, ids in prompts.items():
        start(runner, slot, ids, 10)
    finish(runner, slots)
    for slot, ids in prompts.items():
        assert tokens(runner, slot) == plain(model, ids, 10)


def test_sequences_join_and_leave(model):
    first, second, third = prompt(6), prompt(11), prompt(3)
    runner = runner_of(model, slots=2)
    start(runner, 0, first, 8)
    runner.advance([0], 3)
    start(runner, 1, second, 20)
    runner.advance([0, 1], 6)  # the first ends on the way
    assert tokens(runner, 0) == plain(model, first, 8)
    start(runner, 0, third, 9)
    finish(runner, [0, 1])
    assert tokens(runner, 0) == plain(model, third, 9)
    assert tokens(runner, 1) == plain(model, second, 20)


def test_slots_that_do_not_run_are_left_alone(model):
    runner = runner_of(model)
    start(runner, 1, prompt(5), 6)
    fill(runner, 2, prompt(4), 6)
    before = {name: value.clone() for name, value in vars(runner.state).items()}
    runner.advance([0, 2, 3], 2)
    for name, value in vars(runner.state).items():
        assert torch.equal(value, before[name]), name
    finish(runner, [0, 1, 2])
    assert runner._cache[:, [0, 2, 3]].isnan().all()
    written = runner._cache[:, 1].isfinite().all(-1)
    assert written[:, :, :10].all()
    assert not written[:, :, 10:].any()


def test_up_to_the_last_position(model):
    ids, neighbour = prompt(CAPACITY - 3), prompt(CAPACITY)
    runner = runner_of(model, slots=2)
    start(runner, 0, ids, 4)
    start(runner, 1, neighbour, 1)
    finish(runner, [0, 1])
    assert len(tokens(runner, 0)) == CAPACITY + 1
    # The plain model has no position for a token more.
    assert tokens(runner, 0) == plain(model, ids, 4)
    assert tokens(runner, 1) == plain(model, neighbour, 1)


def test_a_sequence_alone_takes_the_step_of_one_row(model, monkeypatch):
    """In turns with a batch and with drafts, and whatever the number of threads is."""
    prompts = [prompt(6), prompt(9)]
    runner = runner_of(model, slots=2)
    taken, row_step = [], torch_runner._RowStep.__call__

    def record(step: Any, slot: int, position: int, token: int) -> Tensor:
        taken.append((slot, position))
        return row_step(step, slot, position, token)

    monkeypatch.setattr(torch_runner._RowStep, "__call__", record)
    for slot, ids in enumerate(prompts):
        start(runner, slot, ids, 16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runner.advance([1], 2)
            runner.advance([0, 1], 1)
    finally:
        torch.set_num_threads(before)
    runner.advance([1], 1, drafts=2)
    assert taken == [(1, position) for position in (9, 10, 12, 13, 15, 16)]
    finish(runner, [0, 1])
    for slot, ids in enumerate(prompts):
        assert tokens(runner, slot) == plain(model, ids, 16)


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_a_long_prompt_in_chunks(model, chunk, monkeypatch):
    ids = prompt(19)
    whole = runner_of(model, slots=1)
    start(whole, 0, ids, 8)
    finish(whole, [0])
    monkeypatch.setattr(torch_runner, "_CHUNK", chunk)
    runner = runner_of(model)
    fill(runner, 3, ids, 8)
    runner.prefill(3, 0, 10)
    assert runner.state.lengths[3] == 10
    assert runner.state.status[3] == IDLE
    runner.state.status[3] = RUNNING
    runner.prefill(3, 10, 19)
    assert runner.state.lengths[3] == 19
    finish(runner, [3])
    assert tokens(runner, 3) == tokens(whole, 0) == plain(model, ids, 8)


@pytest.mark.parametrize("chunk", [512, 8])
def test_prompts_together(model, chunk, monkeypatch):
    monkeypatch.setattr(torch_runner, "_CHUNK", chunk)
    prompts = [prompt(n) for n in (6, 6, 1, 11)]
    runner = runner_of(model)
    for slot, ids in enumerate(prompts):
        fill(runner, slot, ids, 8)
    runner.prefill(3, 0, 4)
    runner.state.status[[0, 1, 3]] = RUNNING
    runner.prefill_many([(0, 0, 6), (1, 0, 6), (2, 0, 1), (3, 4, 11)])
    assert runner.state.lengths.tolist() == [6, 6, 1, 11]
    finish(runner, [0, 1, 3])
    for slot in (0, 1, 3):
        assert tokens(runner, slot) == plain(model, prompts[slot], 8)
    assert runner.state.status[2] == IDLE


def test_a_prefix_is_copied(model):
    prefix, rest = prompt(12), prompt(4)
    ids = torch.cat((prefix, rest))
    runner = runner_of(model)
    fill(runner, 2, prefix, 1)
    runner.prefill(2, 0, 12)
    runner.copy_prefix(2, 0, 12)
    start(runner, 0, ids, 10, at=12)
    finish(runner, [0])
    assert tokens(runner, 0) == plain(model, ids, 10)
    assert runner._cache[:, 0, :, 25:].isnan().all()


def test_drafts_change_no_token(model):
    prompts = [prompt(7), prompt(7), prompt(10)]
    expected = [plain(model, ids, 15) for ids in prompts]
    runner = runner_of(model, slots=3)
    state = runner.state
    for slot, ids in enumerate(prompts):
        start(runner, slot, ids, 15)
    steps = 0
    while any(state.status == RUNNING):
        steps += 1
        for slot, row in enumerate(expected):
            length = int(state.lengths[slot])
            drafts = torch.tensor((row + [0] * 4)[length + 1 : length + 4])
            if slot == 1:
                drafts[1] = (drafts[1] + 1) % VOCAB  # after one that is right
            state.tokens[slot, length + 1 : length + 4] = drafts
        runner.advance([0, 1, 2], 1, drafts=3)
    assert [tokens(runner, slot) for slot in range(3)] == expected
    assert steps == 7  # the slot with a wrong draft gets two tokens a step; the others get four


def test_keys_and_values_are_the_models(model):
    ids = prompt(9)
    runner = runner_of(model)
    start(runner, 1, ids, 5)
    finish(runner, [1])
    held = torch.tensor(tokens(runner, 1)[:-1])
    cache = model(held[None], use_cache=True).past_key_values
    found = runner.keys_values(1, 13)
    assert len(found) == len(cache)
    for ours, theirs in zip(found, cache, strict=True):
        assert not ours.is_inference()
        assert_close("model", "forward", ours, theirs[:, 0])
    kept = [layer.clone() for layer in found]
    start(runner, 1, prompt(20), 1)
    assert all(map(torch.equal, found, kept))  # copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("native", [False, True])
def test_16_bit_logits_are_as_exact_as_plain_ones(dtype, native, monkeypatch):
    torch.manual_seed(0)
    model = tiny(n_layer=3).to(dtype)
    oracle = tiny(n_layer=3).double()
    oracle.load_state_dict(model.state_dict())
    monkeypatch.setattr(cpu_linear, "multiplies_fast", lambda dtype, device: native)
    monkeypatch.setattr(cpu_linear, "_HEAD_ROWS", 40)
    taken: list[Tensor] = []
    select = torch_runner.select_and_commit

    def record(state: Any, slots: Any, drafts: int, logits: Tensor) -> None:
        taken.append(logits)
        select(state, slots, drafts, logits)

    monkeypatch.setattr(torch_runner, "select_and_commit", record)
    runner = runner_of(model)
    assert runner._cache.dtype == (dtype if native else torch.float32)
    for slot in range(4):
        start(runner, slot, prompt(12), 9)
    steps = [([0], 4), ([0, 1, 2, 3], 4)]  # alone, and in a batch
    for slots, count in steps:
        taken.clear()
        runner.advance(slots, count)
        ours = torch.stack(taken, 1).flatten(0, 1)
        rows = [runner.state.tokens[s, : int(runner.state.lengths[s])] for s in slots]
        with torch.no_grad():
            exact = torch.cat([oracle(row[None]).logits[0, -count:] for row in rows])
            same = torch.cat([model(row[None]).logits[0, -count:] for row in rows])
        assert ours.dtype == torch.float32
        assert_close("model", "forward", ours, exact, same.float(), dtype)
    assert all(layer.dtype == dtype for layer in runner.keys_values(0, 3))


def test_16_bits_whatever_the_default_is(monkeypatch, request):
    monkeypatch.setattr(cpu_linear, "multiplies_fast", lambda dtype, device: False)
    model, ids = tiny().bfloat16(), prompt(5)

    def generated() -> list[int]:
        runner = runner_of(model)
        start(runner, 0, ids, 6)
        finish(runner, [0])
        return tokens(runner, 0)

    expected = generated()
    request.getfixturevalue("float64_by_default")
    assert generated() == expected


@pytest.mark.parametrize("mode", ["int8", "fp16"])
def test_quantised_models(mode):
    torch.manual_seed(0)
    model = gpt2fast.quantize(tiny(), mode)
    prompts = [prompt(6), prompt(9), prompt(6)]
    runner = runner_of(model)
    for slot, ids in enumerate(prompts):
        start(runner, slot, ids, 8)
    finish(runner, [0, 1, 2])
    for slot, ids in enumerate(prompts):
        assert tokens(runner, slot) == plain(model, ids, 8)


def test_the_model_is_not_kept_alive():
    model = tiny()
    weights = model.transformer.h[0].mlp.c_fc.weight.data_ptr()
    runner = runner_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    start(runner, 0, prompt(3), 4)
    finish(runner, [0])
    # Nothing is packed: the weights are where they were.
    fc = runner._layers[0].fc
    assert isinstance(fc, cpu_linear._Plain)
    assert fc._weight.data_ptr() == weights
    runner.close()
    assert runner._cache.numel() == 0
