"""What only a GPU can show of decoding: real sizes, 16 bits, graphs, both drivers, memory."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.suite.decode import rounded_model, rounding_model, shortfalls
from bench.suite.decode_peers import random_model
from gpt2fast import kernels
from gpt2fast.engine.triton_runner import TritonRunner
from gpt2fast.kernels import decode_step
from tests.engine.runners import fill, plain, start, tokens
from tests.tolerances import BUDGET, relative_error

pytestmark = pytest.mark.gpu

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
NEW = 24


def sized(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a preset's size with random weights and biases."""
    return random_model(name, {}, dtype, torch.device("cuda"))


def random_ids(length: int) -> Tensor:
    return torch.randint(50257, (length,), device="cuda")


def generated(
    runner: Any, prompts: list[Tensor], drafts: int = 0, plain: bool = False
) -> list[list[int]]:
    slots = range(len(prompts))
    for slot, ids in enumerate(prompts):
        start(runner, slot, ids, NEW)
    longest = max(map(len, prompts))
    for _ in range(3):
        steps = (NEW - 1) // (3 * (drafts + 1))
        runner.advance(slots, steps, drafts, 2, plain=plain, context=longest + NEW)
    return [tokens(runner, slot) for slot in slots]


def logits_of(
    model: Any, ids: Tensor, rows: int, cache_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Those of the last ``rows`` ids as rows of a step, and plain PyTorch's, on the CPU."""
    start_of_rows = len(ids) - rows
    runner = TritonRunner(model, 1, len(ids), driver="graph", cache_dtype=cache_dtype)
    fill(runner, 0, ids, 1)
    runner.prefill(0, 0, start_of_rows)
    buffers = runner._rows([0] * rows, list(range(rows)), len(ids))
    with runner.working():
        decode_step.evaluate(
            runner.weights, runner.state, runner._cache, buffers, greedy=False, pdl=runner._pdl
        )
    got = buffers.logits.cpu()
    runner.close()
    with kernels.backend("torch"), torch.no_grad():
        same = model(ids[None]).logits[0, start_of_rows:].cpu()
    return got, same


@pytest.mark.parametrize("name", SIZES)
def test_greedy_tokens_are_those_of_the_plain_model(name: str) -> None:
    """In float32, prompts as rows and through the ops, alone and in company."""
    model = sized(name)
    prompts = [random_ids(n) for n in (5, 100, 333, 64, 17)]
    runner = TritonRunner(model, len(prompts), 400, driver="graph")
    for group in ([prompts[2]], prompts):
        for ids, got in zip(group, generated(runner, group), strict=True):
            assert got == plain(model, ids, len(got) - len(ids))
            assert len(got) > len(ids) + 20
    runner.close()


@pytest.mark.parametrize("rows", decode_step.BUCKETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_within_the_budget(rows: int, dtype: torch.dtype) -> None:
    """Every bucket, at the size of the smallest model: within twice plain PyTorch's error."""
    model = sized("gpt2", dtype)
    ids = random_ids(300 + rows)
    got, same = logits_of(model, ids, rows)
    with kernels.backend("torch"), torch.no_grad():
        oracle = model.float()(ids[None]).logits[0, 300:].double().cpu()
    allowed = BUDGET * relative_error(same, oracle) + torch.finfo(dtype).eps / 2
    assert relative_error(got, oracle) <= allowed


needs_float8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="needs compute capability 8.9",
)


@needs_float8
@pytest.mark.parametrize("rows", [1, 4, 32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_with_a_float8_cache(rows: int, dtype: torch.dtype) -> None:
    """Within twice plain PyTorch's error, where both round keys and values to float8; and no
    further from those of a 16-bit cache than twice what that rounding does in float32."""
    model = sized("gpt2", dtype)
    ids = random_ids(300 + rows)
    got, _ = logits_of(model, ids, rows, torch.float8_e4m3fn)
    wide, _ = logits_of(model, ids, rows)
    rounding = rounding_model(model)
    exact = model.float()
    with kernels.backend("torch"), torch.no_grad():
        same = rounding(ids[None]).logits[0, 300:].cpu()
        oracle = rounding_model(exact)(ids[None]).logits[0, 300:].double().cpu()
        unrounded = exact(ids[None]).logits[0, 300:].double().cpu()
    allowed = BUDGET * relative_error(same, oracle) + torch.finfo(dtype).eps / 2
    assert relative_error(got, oracle) <= allowed
    rounded_by = relative_error(oracle, unrounded)
    assert relative_error(got, wide) <= BUDGET * rounded_by


@needs_float8
@pytest.mark.parametrize("rows", [2, 32])
def test_tokens_with_a_float8_cache(rows: int) -> None:
    """Long prompts through the ops and steps behind them."""
    model = sized("gpt2", torch.bfloat16)
    runner = TritonRunner(model, rows, 400, cache_dtype=torch.float8_e4m3fn)
    prompts = [random_ids(300) for _ in range(rows)]
    got = generated(runner, prompts, plain=True)
    assert runner._cache.nbytes == 12 * 2 * rows * 400 * 768
    chosen = torch.tensor([row[300:] for row in got[:4]], device="cuda")
    exact = rounding_model(rounded_model(model, None))
    short, allowed = shortfalls(exact, rounding_model(model), torch.stack(prompts[:4]), chosen)
    assert short <= allowed
    runner.close()


@needs_float8
def test_a_float8_cache_saturates() -> None:
    """As prompts of rows, of ops and as steps, of few rows and of many."""
    model = sized("gpt2", torch.bfloat16)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.bias[768] = -2e3
            block.attn.c_attn.bias[1536] = 1e30
    runner = TritonRunner(model, 8, 200, cache_dtype=torch.float8_e4m3fn)
    for slot, length in enumerate((1, 3, 60, 100, 1, 3, 60, 100)):
        start(runner, slot, random_ids(length), NEW)
    runner.advance([0], 2, plain=True)
    runner.advance(range(8), 2)
    for slot in range(8):
        for layer in runner.keys_values(slot, int(runner.state.lengths[slot])):
            assert layer.isfinite().all()
            assert (layer[0, 0, :, 0] == -448).all()
            assert (layer[1, 0, :, 0] == 448).all()
    runner.close()


@pytest.mark.parametrize("plain_steps", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("name", SIZES[:2])
def test_both_drivers_give_the_same(name: str, rows: int, plain_steps: bool) -> None:
    """In float32, where their different order of summing up decides nothing."""
    model = sized(name)
    prompts = [random_ids(n) for n in (100, 5, 333, 64)[:rows]]
    found = []
    for driver in ("graph", "persistent"):
        runner = TritonRunner(model, rows, 400, driver=driver)
        found.append(generated(runner, prompts, plain=plain_steps))
        runner.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("name", SIZES)
def test_the_persistent_kernel_is_trusted(name: str) -> None:
    """In bfloat16, as where there is no dependent launch: its own comparison with the kernels by
    phases finds nothing."""
    model = sized(name, torch.bfloat16)
    runner = TritonRunner(model, 2, 400)
    runner._pdl = False
    prompts = [random_ids(300), random_ids(20)]
    got = generated(runner, prompts, plain=True)
    assert runner._trusted
    assert runner._resident
    chosen = torch.tensor([got[0][300:]], device="cuda")
    short, allowed = shortfalls(rounded_model(model, None), model, prompts[0][None], chosen)
    assert short <= allowed
    runner.close()


@pytest.mark.parametrize("drafts", [1, 3, 7])
def test_drafts_change_no_token(drafts: int) -> None:
    model = sized("gpt2")
    prompts = [random_ids(30).repeat(4), random_ids(9)]
    runner = TritonRunner(model, 2, 300)
    for ids, got in zip(prompts, generated(runner, prompts, drafts), strict=True):
        assert got == plain(model, ids, len(got) - len(ids))
    runner.close()


@pytest.mark.parametrize("bits", [8, 4])
def test_low_bits_end_near_the_rounded_model(bits: int) -> None:
    model = sized("gpt2", torch.bfloat16)
    runner = TritonRunner(model, 4, 400, bits=bits)
    prompts = [random_ids(200) for _ in range(4)]
    got = generated(runner, prompts)
    chosen = torch.tensor([row[200:] for row in got], device="cuda")
    exact = rounded_model(model, bits)
    short, allowed = shortfalls(exact, model, torch.stack(prompts), chosen)
    assert short <= allowed
    runner.close()


def test_steps_are_replayed() -> None:
    """Graphs are made once, whatever sequences come, and nothing is allocated while they run."""
    model = sized("gpt2", torch.bfloat16)
    runner = TritonRunner(model, 2, 400)
    for _ in range(3):
        generated(runner, [random_ids(100), random_ids(30)])
    torch.cuda.synchronize()
    graphs = {k: id(graph) for k, graph in runner._replayer._graphs.items() if graph is not None}
    assert {key if isinstance(key, str) else key[0] for key in graphs} == {
        "choice",
        "prompt",
        "rows",
        "step",
    }
    before = torch.cuda.memory_allocated()
    generated(runner, [random_ids(101), random_ids(31)])
    assert torch.cuda.memory_allocated() == before
    again = {k: id(graph) for k, graph in runner._replayer._graphs.items() if graph is not None}
    assert again == graphs
    runner.close()


def test_other_streams_are_waited_for() -> None:
    model = sized("gpt2")
    ids = random_ids(50)
    expected = plain(model, ids, 8)
    runner = TritonRunner(model, 1, 100)
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)
            start(runner, 0, ids, 8)
            runner.advance([0], 7)
            assert tokens(runner, 0) == expected
    runner.close()


def test_closing_frees_the_memory() -> None:
    model = sized("gpt2", torch.bfloat16)
    before = None
    for _ in range(3):
        runner = TritonRunner(model, 4, 500)
        generated(runner, [random_ids(n) for n in (200, 30, 5, 100)])
        runner.close()
        del runner
        gc.collect()
        held = torch.cuda.memory_allocated()
        before = before or held  # the first leaves the libraries' workspaces behind
        assert held == before


def test_memory_that_is_not_there() -> None:
    from gpt2fast.engine.runner import OutOfMemory

    model = sized("gpt2", torch.bfloat16)
    total = torch.cuda.mem_get_info()[1]
    before = torch.cuda.memory_allocated()
    slots = 2 * total // (12 * 2 * 768 * 1024 * 2)
    with pytest.raises(OutOfMemory):
        TritonRunner(model, slots, 1024)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    runner = TritonRunner(model, 1, 100)
    generated(runner, [random_ids(20)])
    runner.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_gpu() -> None:
    model = sized("gpt2").to("cuda:1")
    ids = random_ids(100).to("cuda:1")
    runner = TritonRunner(model, 1, 200)
    start(runner, 0, ids, 8)
    runner.advance([0], 7)
    assert tokens(runner, 0) == plain(model, ids, 8)
    assert torch.cuda.current_device() == 0
    runner.close()
