"""The runner on our kernels: whole tokens against the plain model, in Triton's interpreter."""

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpt2fast import Engine, kernels
from gpt2fast.engine import triton_runner
from gpt2fast.engine.runner import OutOfMemory
from gpt2fast.engine.torch_runner import TorchRunner
from gpt2fast.engine.triton_runner import TritonRunner, unsupported
from gpt2fast.engine.weights import pack
from gpt2fast.kernels import decode_step
from gpt2fast.kernels.decode_state import BROKEN, EOS, IDLE, LIMIT, RUNNING
from gpt2fast.kernels.packing import dequantize
from tests.engine.runners import (
    POSITIONS,
    fill,
    plain,
    prompt,
    start,
    tiny,
    tokens,
    triton_kernels,
)
from tests.kernels.devices import DEVICE


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with triton_kernels(monkeypatch):
        yield


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of more than four tokens go through the ops."""
    monkeypatch.setattr(triton_runner, "ROWS_OF_A_PROMPT", 4)


@pytest.mark.parametrize("length", [1, 4, 20])
@pytest.mark.usefixtures("short_rows")
def test_tokens_are_those_of_the_plain_model(length: int) -> None:
    model, ids = tiny(), prompt(length)
    runner = TritonRunner(model, 1, POSITIONS)
    start(runner, 0, ids, 4)
    runner.advance([0], 3, plain=True, context=length)
    assert tokens(runner, 0) == plain(model, ids, 4)
    assert runner.state.status.tolist() == [LIMIT]


def test_prompts_as_rows() -> None:
    model, ids = tiny(n_layer=1), prompt(9)
    runner = TritonRunner(model, 2, POSITIONS)
    start(runner, 1, ids, 2)
    runner.advance([1], 1)
    assert tokens(runner, 1) == plain(model, ids, 2)


@pytest.mark.usefixtures("short_rows")
def test_sequences_join_and_leave() -> None:
    model = tiny()
    first, second, third = prompt(3), prompt(7), prompt(2)
    runner = TritonRunner(model, 3, POSITIONS)
    start(runner, 2, first, 20)
    start(runner, 0, second, 3)
    runner.advance([2, 0], 3)
    assert runner.state.status.tolist() == [LIMIT, IDLE, RUNNING]
    assert tokens(runner, 0) == plain(model, second, 3)
    start(runner, 0, third, 10)  # a slot is used again
    runner.advance([0, 2], 1, context=12)
    assert tokens(runner, 2) == plain(model, first, 5)
    assert tokens(runner, 0) == plain(model, third, 2)


def test_ended_sequences_stay_as_they_are() -> None:
    model, ids = tiny(), prompt(3)
    expected = plain(model, ids, 4)
    last = next(i for i in range(4, 7) if expected[i] not in expected[3:i])
    runner = TritonRunner(model, 2, POSITIONS)
    start(runner, 0, ids, 20, eos=[expected[last]] + [-1] * 7)
    start(runner, 1, ids, 2)
    runner.advance([0, 1], last - 1)
    assert runner.state.status.tolist() == [EOS, LIMIT]
    assert tokens(runner, 0) == expected[: last + 1]
    assert tokens(runner, 1) == expected[:5]


@pytest.mark.usefixtures("short_rows")
def test_sampling_as_on_the_cpu() -> None:
    """Other slots' settings and company make no difference."""
    model = tiny()
    uniforms = torch.rand(2, POSITIONS + 1, dtype=torch.float64, device=DEVICE)
    settings: list[dict[str, Any]] = [
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.2, "min_p": 0.05, "penalty": 1.3, "least": 6, "eos": [5] * 8},
    ]
    prompts = prompt(6), prompt(3)
    found = []
    for kind in (TorchRunner, TritonRunner):
        runner: Any = kind(model, 2, POSITIONS)
        for slot, ids in enumerate(prompts):
            start(runner, slot, ids, 4, uniforms=uniforms[slot], **settings[slot])
        for _ in range(3):
            runner.advance([0, 1], 1)
        found.append((tokens(runner, 0), tokens(runner, 1), runner.state))
    assert found[0][:2] == found[1][:2]
    for name in ("lengths", "status", "seen"):
        assert torch.equal(getattr(found[0][2], name), getattr(found[1][2], name)), name
    torch.testing.assert_close(found[0][2].log_probs, found[1][2].log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plain_steps", [False, True])
def test_drafts_change_no_token(plain_steps: bool) -> None:
    model = tiny(n_layer=1)
    prompts = prompt(4).repeat(2), prompt(3)
    runner = TritonRunner(model, 2, POSITIONS)
    for slot, ids in enumerate(prompts):
        start(runner, slot, ids, 12)
    runner.advance([0, 1], 2, 1, 2, plain=plain_steps)
    for slot, ids in enumerate(prompts):
        got = tokens(runner, slot)
        assert got == plain(model, ids, len(got) - len(ids))
        assert len(got) >= len(ids) + 3


def test_persistent_kernel() -> None:
    model, ids = tiny(n_layer=1), prompt(2)
    runner = TritonRunner(model, 1, POSITIONS, driver="persistent")
    start(runner, 0, ids, 4)
    runner.advance([0], 2, plain=True, context=2)
    runner.advance([0], 1)
    assert tokens(runner, 0) == plain(model, ids, 4)


def test_no_steps_need_nothing() -> None:
    """Not even what serves their context."""
    runner = TritonRunner(tiny(n_layer=1), 1, POSITIONS, driver="persistent")
    runner.advance([0], 0, plain=True, context=2)
    assert not runner._buffers
    assert not runner._resident


def test_one_persistent_kernel_serves_all_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, splits = TritonRunner(tiny(n_layer=1), 1, POSITIONS, driver="persistent"), []
    monkeypatch.setattr(runner, "_splits", lambda rows, keys: 1 + keys // 16)
    monkeypatch.setattr(
        decode_step, "decode_persistent", lambda *args, **_: splits.append(args[3].splits)
    )
    for context in (2, 20, 40):
        runner.advance([0], 3, plain=True, context=context)
    assert splits == splits[:1] * 3


def test_matches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, asked = TritonRunner(tiny(n_layer=1), 1, POSITIONS), []
    start(runner, 0, prompt(2), 9)
    monkeypatch.setattr(decode_step, "propose", lambda *args, **_: asked.append(args[2:4]))
    for ngram in (2, 1000):
        runner.advance([0], 1, 1, ngram)
    assert asked == [(1, 2), (1, 16)]


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("length", [3, 6])
def test_a_prompt_without_a_next_token(length: int) -> None:
    """Nothing is handed out for it, whichever way prompts go."""
    model = tiny(n_layer=1)
    with torch.no_grad():
        model.transformer.wpe.weight[length - 1] = torch.nan
    runner = TritonRunner(model, 1, POSITIONS)
    runner.state.tokens.fill_(11)  # of whoever had the slot before
    with Engine(model, runner=runner) as engine:
        sequence = engine.submit(prompt(length), max_new_tokens=4, eos_token_id=[])
        engine.step()
        assert runner.state.status.tolist() == [BROKEN]
        assert runner.state.lengths.tolist() == [length - 1]
    assert (sequence.finish_reason, sequence.token_ids) == ("error", [])


def test_accepted_drafts_save_steps() -> None:
    model = tiny(n_layer=1)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(500)  # every token predicts itself
    ids = torch.tensor([5, 7, 7, 7], device=DEVICE)
    assert plain(model, ids, 9) == [5] + [7] * 12
    runner = TritonRunner(model, 1, POSITIONS)
    start(runner, 0, ids, 20)
    runner.advance([0], 2, 3, 2)
    assert tokens(runner, 0) == [5] + [7] * 12


@pytest.mark.usefixtures("short_rows")
def test_prompt_in_chunks_behind_a_shared_beginning() -> None:
    model, ids = tiny(), prompt(14)
    runner = TritonRunner(model, 3, POSITIONS)
    fill(runner, 2, ids[:10], 4)
    runner.prefill(2, 0, 7)  # only the cache
    assert runner.state.lengths.tolist() == [0, 0, 7]
    assert runner.state.status.tolist() == [IDLE] * 3
    own = runner._cache[:, :, 0]
    own[..., :6, :] = float("nan")  # not read: slot 2 has these positions
    start(runner, 0, ids, 4, at=6, prefix_slots=2, prefix_lengths=6)
    runner.advance([0], 3)
    assert tokens(runner, 0) == plain(model, ids, 4)
    assert own[..., :6, :].isnan().all()
    runner.state.status[2] = RUNNING
    runner.prefill(2, 7, 10)
    assert tokens(runner, 2) == plain(model, ids[:10], 1)
    whole = runner.keys_values(0, 14)
    with kernels.backend("torch"), torch.no_grad():
        past = model(ids[None], use_cache=True).past_key_values
    for layer, expected in zip(whole, past, strict=True):
        torch.testing.assert_close(layer, expected[:, 0], rtol=1e-4, atol=1e-4)
    assert runner.shares_prefix


@pytest.mark.usefixtures("short_rows")
def test_prompts_leave_other_slots_alone() -> None:
    runner = TritonRunner(tiny(n_layer=1), 3, POSITIONS)
    ids = prompt(9)
    for slot in (0, 2):
        start(runner, slot, ids, 4)
    before = runner._cache.clone()
    state = copy.deepcopy(runner.state)
    start(runner, 1, prompt(11), 4)
    for slot in (0, 2):
        assert torch.equal(runner._cache[:, :, slot], before[:, :, slot])
        assert torch.equal(runner.state.tokens[slot], state.tokens[slot])
        assert runner.state.lengths[slot] == state.lengths[slot]


def test_copied_beginning() -> None:
    model, ids = tiny(n_layer=1), prompt(4)
    runner = TritonRunner(model, 2, POSITIONS)
    start(runner, 1, ids, 4)
    runner.copy_prefix(1, 0, 3)
    fill(runner, 0, ids, 4)
    runner.state.lengths[0] = 3
    runner.state.status[0] = RUNNING
    runner.advance([0], 2)
    assert tokens(runner, 0) == plain(model, ids, 2)
    keys, values = zip(*runner.keys_values(0, 3), strict=True)
    again = runner.keys_values(1, 3)
    assert all(torch.equal(layer[0], key) for layer, key in zip(again, keys, strict=True))
    assert values[0].shape == (2, 3, 16)


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("bits", [8, 4])
def test_low_bits(bits: int) -> None:
    """The same as a plain model whose weights are those that the rounded ones stand for."""
    model, ids = tiny(), prompt(6)
    packed = pack(model, bits)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for i, block in enumerate(rounded.transformer.h):
            for matrix, layer in (
                (packed.qkv, block.attn.c_attn),
                (packed.out, block.attn.c_proj),
                (packed.fc, block.mlp.c_fc),
                (packed.proj, block.mlp.c_proj),
            ):
                assert matrix.scale is not None
                layer.weight.copy_(dequantize(matrix.data[i], matrix.scale[i], bits).t())
        head = dequantize(packed.head.data, packed.head.scale, packed.head.bits)[0]
        rounded.lm_head.weight = torch.nn.Parameter(head)
    runner = TritonRunner(model, 1, POSITIONS, bits=bits)
    start(runner, 0, ids, 3)
    runner.advance([0], 2)
    assert tokens(runner, 0) == plain(rounded, ids, 3)


@pytest.mark.usefixtures("short_rows")
def test_other_shapes_and_scales() -> None:
    model = tiny(
        n_inner=72,
        n_embd=48,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-3,
    )
    ids = prompt(7)
    runner = TritonRunner(model, 2, POSITIONS)
    start(runner, 0, ids, 3)
    runner.advance([0], 2)
    assert tokens(runner, 0) == plain(model, ids, 3)


def test_as_long_as_the_context() -> None:
    model, ids = tiny(n_positions=16, n_layer=1), prompt(13)
    runner = TritonRunner(model, 2, 16)
    start(runner, 0, ids, 4)
    runner.advance([0], 3)
    got = tokens(runner, 0)
    assert got[:16] == plain(model, ids, 3)
    assert len(got) == 17  # the last position's prediction is one more than the context


def test_in_inference_mode_and_out_of_it() -> None:
    model, ids = tiny(n_layer=1), prompt(3)
    with torch.inference_mode():
        runner = TritonRunner(model, 1, POSITIONS)
    start(runner, 0, ids, 6)
    with torch.inference_mode():
        runner.advance([0], 1)
    runner.advance([0], 1)
    assert tokens(runner, 0) == plain(model, ids, 3)


def test_refuses() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="multiples of 8; got 62"):
        TritonRunner(tiny(n_embd=62), 1, 8)
    assert "2 wide" not in (unsupported(model) or "")
    assert "heads are 136 wide" in (unsupported(tiny(n_embd=272)) or "")
    model.transformer.h[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="block 0"):
        TritonRunner(model, 1, 8)
    for slots, capacity in ((0, 8), (1, 0), (1, POSITIONS + 1)):
        with pytest.raises(ValueError, match="expected slots of at least 1"):
            TritonRunner(tiny(), slots, capacity)
    with pytest.raises(ValueError, match="driver"):
        TritonRunner(tiny(), 1, 8, driver="fast")
    with pytest.raises(ValueError, match="drafts"):
        TritonRunner(tiny(), 1, 8).advance([0], 1, 256)


def test_keeps_nothing_behind() -> None:
    model = tiny(n_layer=1)
    runner = TritonRunner(model, 1, POSITIONS)
    start(runner, 0, prompt(3), 6)
    runner.advance([0], 1)
    held = [weakref.ref(model), weakref.ref(runner.weights.qkv.data), weakref.ref(runner._cache)]
    del model
    gc.collect()
    assert held[0]() is None
    runner.close()
    runner.close()
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


@pytest.mark.parametrize("call", range(4))
def test_out_of_memory_while_it_is_built(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that was allocated before is given back."""
    model = tiny()
    allocated: list[weakref.ref[Any]] = []
    names = [(triton_runner, "pack"), (triton_runner.DecodeState, "empty"), (torch, "zeros")]
    count = 0

    def failing(original: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > call:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
            made = original(*args, **kwargs)
            held = made if isinstance(made, torch.Tensor) else getattr(made, "tokens", None)
            allocated.append(weakref.ref(made.qkv.data if held is None else held))
            return made

        return allocate

    for owner, name in names:
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    if call < 3:
        with pytest.raises(OutOfMemory, match=r"^CUDA out of memory\. Tried to allocate 1 GiB$"):
            TritonRunner(model, 1, POSITIONS)
        assert len(allocated) == call
    else:
        TritonRunner(model, 1, POSITIONS).close()
    gc.collect()
    assert [ref() for ref in allocated] == [None] * len(allocated)


def test_out_of_memory_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is as it was, and the same call works where there is memory again."""
    model, ids = tiny(n_layer=1), prompt(3)
    runner = TritonRunner(model, 2, POSITIONS)
    start(runner, 0, ids, 9)
    start(runner, 1, ids, 9)
    state = copy.deepcopy(runner.state)
    original, attempts = triton_runner.StepBuffers.allocate, 0

    def allocate(*args: Any, **kwargs: Any) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts in (1, 2, 3):
            raise torch.OutOfMemoryError("no memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(triton_runner.StepBuffers, "allocate", allocate)
    with pytest.raises(OutOfMemory, match="no memory"):
        runner.advance([0, 1], 2)
    assert attempts == 2
    for name in ("tokens", "lengths", "status", "seen"):
        assert torch.equal(getattr(runner.state, name), getattr(state, name))
    runner.advance([0, 1], 1)  # the first attempt fails: what can be made again is given up
    assert attempts == 4
    assert tokens(runner, 0) == plain(model, ids, 2)
    assert tokens(runner, 1) == plain(model, ids, 2)
