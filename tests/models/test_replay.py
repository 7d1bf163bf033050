"""Forward passes replayed as CUDA graphs: on a CPU with stand-ins for graphs, and on a GPU.

A stand-in replays by doing its work again, into the memory that the recorded work left its results
in, as a graph would.
"""

import contextlib
import copy
import gc
import itertools
import pickle
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpt2fast
from gpt2fast import replay
from gpt2fast.engine import graphs
from gpt2fast.kernels.backend import selected_backend
from gpt2fast.layers import LayerNorm
from gpt2fast.transformer import GPT2Model
from tests.models.reference import randomize, sizes, tokens

_Replayer = graphs.Replayer


class Emulation:
    """Stands in for CUDA, and says what happened."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.recorded = 0
        self.replayed = 0
        self.emptied = 0
        self.fails: Exception | None = None
        self.current = "current"
        self.streams: dict[str, Any] = {}

    def counts(self) -> tuple[int, int]:
        """Recordings and replays since the last time; a recording is replayed at once."""
        counts = self.recorded, self.replayed
        self.recorded = self.replayed = 0
        return counts

    def stream(self, name: str) -> Any:
        if name not in self.streams:
            self.streams[name] = SimpleNamespace(
                name=name,
                wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
                synchronize=lambda: None,
            )
        return self.streams[name]

    def graph_of(self, work: Any) -> Any:
        """Do the work, and what a graph of it is."""
        if self.fails is not None:
            raise self.fails
        self.recorded += 1
        recording = work.func.__self__
        model = weakref.ref(work.args[0])  # a graph keeps no module

        def again() -> None:
            self.replayed += 1
            held = recording.hidden
            with torch.inference_mode(False), torch.no_grad():
                recording.evaluate(model())
                held.copy_(recording.hidden)
            recording.hidden = held

        work()
        assert recording.hidden is not None
        recording.hidden.fill_(float("nan"))  # what is recorded has not run
        return SimpleNamespace(replay=again)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    emulation = Emulation()

    class Emulated(_Replayer):
        def __init__(self, device: torch.device) -> None:
            super().__init__(torch.device("cuda", 0))

        def _recorded(self, work: Any) -> Any:
            with graphs._RECORDING:
                return emulation.graph_of(work)

    @contextlib.contextmanager
    def entered(stream: Any) -> Iterator[None]:
        before, emulation.current = emulation.current, stream.name
        yield
        emulation.current = before

    def empty() -> None:
        emulation.emptied += 1

    for name, replacement in {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": lambda: emulation.stream("own"),
        "current_stream": lambda device=None: emulation.stream(emulation.current),
        "stream": entered,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(graphs, "_UNUSED_STREAMS", defaultdict(list))
    monkeypatch.setattr(graphs, "Replayer", Emulated)
    monkeypatch.setattr(graphs, "empty_cache", empty)
    monkeypatch.setattr(replay, "_DEVICES", ("cpu",))
    # In the place of our kernels, whose interpreter takes seconds; who serves is all the same here.
    monkeypatch.setattr(replay, "serves", lambda device: selected_backend() != "torch")
    return emulation


def made(kind: str = "GPT2Model", **overrides: Any) -> Any:
    model = getattr(gpt2fast, kind)(gpt2fast.GPT2Config(**sizes(n_layer=2, **overrides)))
    randomize(model)
    return model.eval()


def eager(model: Any, ids: Tensor, **options: Any) -> Any:
    """What the modules compute: a copy of the model that has seen no shape."""
    with torch.no_grad():
        return copy.deepcopy(model)(ids, **options)


def assert_same(got: Any, want: Any) -> None:
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert (got.past_key_values is None) == (want.past_key_values is None)
    if want.past_key_values is not None:
        assert got.past_key_values.capacity == want.past_key_values.capacity
        for ours, theirs in zip(got.past_key_values, want.past_key_values, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("shape", [(1, 7), (3, 5), (2, 2, 4), (6,)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_recorded_the_second_time(cuda: Emulation, mode: Any, shape: Any, use_cache: bool) -> None:
    """And the outputs are the caller's: later calls do not write over them."""
    model, kept = made(), []
    for call in range(5):
        ids = tokens(*shape)
        with mode():
            kept.append((ids, model(ids, use_cache=use_cache)))
        assert cuda.counts() == ((0, 0) if call == 0 else (int(call == 1), 1))
    for ids, got in kept:
        assert_same(got, eager(model, ids, use_cache=use_cache))


def warmed(cuda: Emulation, model: Any, *shape: int, **options: Any) -> Tensor:
    """Some ids of a shape that is recorded."""
    with torch.no_grad():
        for _ in range(2):
            model(tokens(*shape), **options)
    assert cuda.counts() == (1, 1)
    return tokens(*shape)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_ids_of_other_dtypes(cuda: Emulation, dtype: torch.dtype) -> None:
    model = made()
    ids = warmed(cuda, model, 2, 6)
    with torch.no_grad():
        assert_same(model(ids.to(dtype)), eager(model, ids))
        with pytest.raises(ValueError, match="must be integers"):
            model(ids.float())
    assert cuda.counts() == (0, 1)


def test_ids_are_checked(cuda: Emulation) -> None:
    model = made()
    ids = warmed(cuda, model, 1, 6)
    with torch.no_grad():
        for bad in (-1, model.config.vocab_size):
            with pytest.raises(ValueError, match=rf"must be in \[0, .*got {bad}"):
                model(torch.full_like(ids, bad))
        for _ in range(3):
            with pytest.raises(ValueError, match="positions"):
                model(tokens(1, model.config.n_positions + 1))
            with pytest.raises(ValueError, match="empty"):
                model(ids[:, :0])
    assert cuda.counts() == (0, 0)


def test_the_cache_goes_on(cuda: Emulation) -> None:
    """Two branches of it, in place and not."""
    model = made("GPT2LMHeadModel")
    ids = warmed(cuda, model, 2, 6, use_cache=True)
    more = tokens(2, 3)
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        model(tokens(2, 6), use_cache=True)
        whole = torch.cat((ids, more), 1)
        want = eager(model, whole).logits[:, 6:]
        branches = [
            model(rows, past_key_values=past, use_cache=True) for rows in (more, tokens(2, 1), more)
        ]
        assert branches[0].past_key_values.buffers[0].data_ptr() == past.buffers[0].data_ptr()
    for branch in (branches[0], branches[2]):
        torch.testing.assert_close(branch.logits, want, rtol=1e-5, atol=1e-5)


def test_the_head_and_its_options(cuda: Emulation) -> None:
    model = made("GPT2LMHeadModel")
    ids = warmed(cuda, model, 2, 6, use_cache=True)
    with torch.no_grad():
        for options in ({}, {"logits_to_keep": 1}, {"labels": ids}, {"return_dict": False}):
            got = model(ids, use_cache=True, **options)
            want = eager(model, ids, use_cache=True, **options)
            if options.get("return_dict", True):
                assert torch.equal(got.logits, want.logits)
            assert torch.equal(got[0], want[0])
    assert cuda.counts() == (0, 4)


def test_weights_written_in_place_count(cuda: Emulation) -> None:
    model = made()
    ids = warmed(cuda, model, 2, 6)
    other = made()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight.mul_(1.5)
        assert_same(model(ids), eager(model, ids))
        model.load_state_dict(other.state_dict())
        assert_same(model(ids), eager(other, ids))
    assert cuda.counts() == (0, 2)


def _assigned(model: Any) -> None:
    model.load_state_dict(copy.deepcopy(made().state_dict()), assign=True)


def _moved(model: Any) -> None:
    model.h[0].ln_1.weight.data = torch.rand(model.config.n_embd)


def _replaced_parameter(model: Any) -> None:
    model.h[1].attn.c_proj.bias = nn.Parameter(torch.rand(model.config.n_embd))


def _replaced_module(model: Any) -> None:
    model.ln_f = LayerNorm(model.config.n_embd)


def _scaled(model: Any) -> None:
    model.h[0].attn.scaling = 0.5


def _less_precise(model: Any) -> None:
    model.h[0].ln_2.eps = 0.1


def _resized(model: Any) -> None:
    model.resize_token_embeddings(model.config.vocab_size + 3)


CHANGES: list[Callable[[Any], Any]] = [
    _assigned, _moved, _replaced_parameter, _replaced_module, _scaled, _less_precise, _resized,
    lambda model: model.double().float(), lambda model: model.bfloat16(),
    lambda model: model.half(),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_in_place_is_recorded_anew(cuda: Emulation, change: Any) -> None:
    model = made()
    ids = warmed(cuda, model, 2, 6)
    change(model)
    want = eager(model, ids)
    with torch.no_grad():
        for _ in range(3):  # the first may be replayed before the change is seen, and is not used
            assert_same(model(ids), want)
        assert cuda.counts()[0] == 1
        assert_same(model(ids), want)
    assert cuda.counts() == (0, 1)


def test_parameters_that_change_with_every_call_are_never_recorded(cuda: Emulation) -> None:
    """And after a while are not looked at."""
    model, ids = made(), tokens(1, 4)
    for _ in range(replay._MOST_CHANGES + 3):
        weights = {name: p.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            got = torch.func.functional_call(model, weights, (ids,))
        assert_same(got, eager(model, ids))
    assert cuda.counts() == (0, 0)
    assert replay._KEPT[model]._changes == replay._MOST_CHANGES + 1


def test_memory_comes_back_where_the_model_moves(cuda: Emulation) -> None:
    model = made("GPT2LMHeadModel")
    warmed(cuda, model, 2, 6)
    hidden = weakref.ref(_recordings(model.transformer)[0].hidden)
    model.to(torch.float64)
    gc.collect()
    assert hidden() is None
    assert not len(replay._KEPT)


def _recordings(model: nn.Module) -> list[Any]:
    return [*replay._KEPT[model]._recordings.values()]


def test_release_gives_recordings_back(cuda: Emulation) -> None:
    model = made("GPT2LMHeadModel")
    ids = warmed(cuda, model, 1, 6)
    assert _recordings(model.transformer)
    gpt2fast.release(model)
    assert model.transformer not in replay._KEPT
    with torch.no_grad():
        model(ids)
    assert cuda.counts() == (0, 0)  # seen for the first time


SUBMODULES = ["h.1", "h.0.attn", "h.0.mlp.act", "h.1.mlp.c_fc", "ln_f", "wte", "drop", ""]


@pytest.mark.parametrize("name", SUBMODULES)
def test_hooks_are_called(cuda: Emulation, name: str) -> None:
    model, calls = made(), []
    ids = warmed(cuda, model, 1, 6)
    handle = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(ids)
        assert calls
        handle.remove()
        assert cuda.counts() == (0, 0)
        everywhere = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(2))
        try:
            model(ids)
        finally:
            everywhere.remove()
        assert calls.count(2) > 10
        assert cuda.counts() == (0, 0)
        model(ids)
        assert cuda.counts() == (0, 1)


@pytest.mark.parametrize("name", ["h.1.mlp", "h.0.attn.c_attn", "ln_f"])
def test_a_forward_replaced_on_an_instance_is_called(cuda: Emulation, name: str) -> None:
    model, calls = made(), []
    ids = warmed(cuda, model, 1, 6)
    module = model.get_submodule(name)
    plain = module.forward

    def counted(*args: Any) -> Any:
        calls.append(1)
        return plain(*args)

    module.forward = counted
    with torch.no_grad():
        for _ in range(3):
            model(ids)
    recorded, replays = cuda.counts()
    assert not recorded
    assert len(calls) - replays == 3  # a stand-in replays by calling the modules
    assert not _recordings(model)


def _with_mask(model: Any, ids: Tensor) -> Any:
    return model(ids, attention_mask=torch.ones_like(ids))


def _with_gradient(model: Any, ids: Tensor) -> Any:
    with torch.enable_grad():
        out = model(ids)
    assert out.last_hidden_state.requires_grad
    return out


def _autocast(model: Any, ids: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(ids)


def _on_pytorch(model: Any, ids: Tensor) -> Any:
    with gpt2fast.backend("torch"):
        return model(ids)


def _profiled(model: Any, ids: Tensor) -> Any:
    with torch.profiler.profile():
        return model(ids)


OTHERWISE: list[Callable[[Any, Tensor], Any]] = [
    _with_mask,
    _with_gradient,
    _autocast,
    _on_pytorch,
    _profiled,
    lambda model, ids: model(inputs_embeds=model.wte(ids)),
    lambda model, ids: model(ids, token_type_ids=ids),
    lambda model, ids: model(ids, position_ids=torch.arange(ids.shape[1])),
    lambda model, ids: model(ids, output_attentions=True),
    lambda model, ids: model(ids, output_hidden_states=True),
    lambda model, ids: model(ids, head_mask=torch.ones(model.config.n_head)),
    lambda model, ids: model(ids[:, 2:], past_key_values=model(ids[:, :2]).past_key_values),
]


@pytest.mark.parametrize("call", OTHERWISE)
def test_other_calls_go_through_the_modules(cuda: Emulation, call: Any) -> None:
    model = made()
    ids = warmed(cuda, model, 2, 6)
    with torch.no_grad():
        got = call(model, ids)
        assert cuda.counts() == (0, 0)
        model(ids)
        assert cuda.counts() == (0, 1)
        assert torch.equal(got[0], call(copy.deepcopy(model), ids)[0])


def test_compiled_models_are_left_alone(cuda: Emulation) -> None:
    model = made()
    ids = warmed(cuda, model, 2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            got = compiled(ids)
        assert cuda.counts() == (0, 0)
        torch.testing.assert_close(got[0], eager(model, ids)[0])
        assert_same(model(ids), eager(model, ids))


def test_dropout_is_drawn_anew(cuda: Emulation) -> None:
    model = made(resid_pdrop=0.5)
    ids = warmed(cuda, model, 1, 6)
    model.h[1].mlp.dropout.train()
    with torch.no_grad():
        drawn = [model(ids)[0] for _ in range(4)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    assert not cuda.counts()[0]


def test_the_least_recently_used_goes(cuda: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """But only for a shape that comes often: else each would be recorded in its turn."""
    monkeypatch.setattr(replay, "_MOST", 2)
    model = made()
    for length in (3, 4):
        warmed(cuda, model, 1, length)
    with torch.no_grad():
        model(tokens(1, 3))
        assert cuda.counts() == (0, 1)
        for sight in range(1, replay._SIGHTS_WHEN_FULL + 2):
            ids = tokens(1, 5)
            assert_same(model(ids), eager(model, ids))
            often = sight - replay._SIGHTS_WHEN_FULL
            assert cuda.counts() == (int(often == 0), int(often >= 0))
        for _ in range(2 * replay._SIGHTS_WHEN_FULL - 1):  # the next one has to come more often
            model(tokens(1, 4))
        assert cuda.counts() == (0, 0)
        model(tokens(1, 3))
        assert cuda.counts() == (0, 1)
        model(tokens(1, 4))
        assert cuda.counts() == (1, 1)


def test_recordings_share_memory_for_keys_and_values(cuda: Emulation) -> None:
    """A longer one does not fit, and works in memory of its own; a shorter one does."""
    model, kept = made(), []
    for shape in ((1, 5), (3, 9), (1, 7), (3, 9), (1, 5)):
        for _ in range(2):
            ids = tokens(*shape)
            with torch.no_grad():
                kept.append((ids, model(ids)))
    for ids, got in kept:
        assert_same(got, eager(model, ids))
    places = [recording.layers.data_ptr() for recording in _recordings(model)]
    assert len(places) == 3
    assert len(set(places)) == 2


@pytest.mark.parametrize("when", ["recording", "copying"])
def test_without_memory_the_modules_serve(
    cuda: Emulation, monkeypatch: pytest.MonkeyPatch, when: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = made()
    ids = warmed(cuda, model, 1, 4)
    if when == "recording":
        cuda.fails = torch.OutOfMemoryError("CUDA out of memory")
        ids = tokens(1, 6)
    else:

        def fails(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(replay._Replays, "_copied", fails)
    with torch.no_grad():
        for _ in range(4):
            assert_same(model(ids), eager(model, ids))
    assert cuda.emptied == 1
    assert not _recordings(model)
    assert not recwarn
    cuda.fails = None
    monkeypatch.undo()


def test_what_cannot_be_recorded_is_said_once(cuda: Emulation) -> None:
    model, ids = made(), tokens(1, 6)
    cuda.fails = RuntimeError("operation not permitted when stream is capturing")
    with torch.no_grad():
        model(ids)
        with pytest.warns(UserWarning, match="cannot be recorded.*not permitted"):
            assert_same(model(ids), eager(model, ids))
        assert_same(model(ids), eager(model, ids))


def test_threads(cuda: Emulation) -> None:
    model = made()
    wrong: list[Any] = []
    inputs = [[tokens(1, 4 + i % 3) for i in range(12)] for _ in range(4)]
    wanted = [[eager(model, ids).last_hidden_state for ids in rows] for rows in inputs]

    def work(rows: list[Tensor], want: list[Tensor]) -> None:
        try:
            with torch.no_grad():
                outputs = [model(ids).last_hidden_state for ids in rows]
            pairs = zip(outputs, want, strict=True)
            wrong.extend(got for got, right in pairs if not torch.equal(got, right))
        except BaseException as error:
            wrong.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert cuda.counts()[0] == 3


def test_streams(cuda: Emulation) -> None:
    """What is recorded runs on the caller's stream, and on another one not before it is done."""
    model = made()
    warmed(cuda, model, 1, 4)
    assert cuda.log == ["own waits for current", "current waits for own"]
    cuda.log.clear()
    with torch.no_grad():
        model(tokens(1, 4))
        assert not cuda.log
        cuda.current = "other"
        model(tokens(1, 4))
        model(tokens(1, 4))
        assert cuda.log == ["other waits for current"]


def test_copies_and_state_know_nothing(cuda: Emulation) -> None:
    model = made("GPT2LMHeadModel")
    before = pickle.dumps(model), list(model.state_dict())
    ids = warmed(cuda, model, 1, 4)
    assert (pickle.dumps(model), list(model.state_dict())) == before
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other(ids).logits, model(ids).logits)
        assert cuda.counts() == (0, 1)
        with torch.no_grad():
            other.transformer.wte.weight.zero_()
            assert_same(model.transformer(ids), eager(model.transformer, ids))
        cuda.counts()


def test_recordings_do_not_keep_a_model(cuda: Emulation) -> None:
    model = made()
    warmed(cuda, model, 1, 4)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_generate_and_score_give_the_same(cuda: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("GPT2LMHeadModel")
    rows = [tokens(n).tolist() for n in (5, 9, 9, 5, 12)]
    ids = tokens(1, 6)
    got = [
        (
            [s.log_probs for s in gpt2fast.Scorer(model, batch_tokens=16)(rows)],
            model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None).tolist(),
        )
        for _ in range(3)
    ]
    assert cuda.counts()[0]
    monkeypatch.setattr(replay, "ENABLED", False)
    want = (
        [s.log_probs for s in gpt2fast.Scorer(model, batch_tokens=16)(rows)],
        model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None).tolist(),
    )
    assert got == [want] * 3
    assert cuda.counts() == (0, 0)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, on in (("0", False), ("1", True), ("", True)):
        monkeypatch.setenv("GPT2FAST_GRAPHS", value)
        assert replay._enabled() is on
    monkeypatch.setenv("GPT2FAST_GRAPHS", "no")
    with pytest.raises(ValueError, match="GPT2FAST_GRAPHS must be 0 or 1; got 'no'"):
        replay._enabled()


def test_a_cpu_records_nothing() -> None:
    model, ids = made(), tokens(1, 4)
    with torch.no_grad():
        for _ in range(3):
            model(ids)
    assert model not in replay._KEPT


@pytest.mark.gpu
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("shape", [(1, 128), (1, 1024), (8, 512)])
def test_on_a_gpu(shape: tuple[int, int], use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed and eager passes of the smallest published size, in bfloat16."""
    model = GPT2Model(gpt2fast.GPT2Config())
    randomize(model, std=0.02)
    model.to("cuda", torch.bfloat16).eval()
    kept = []
    with torch.no_grad():
        for call in range(4):
            ids = torch.randint(model.config.vocab_size, shape, device="cuda")
            kept.append((ids, model(ids, use_cache=use_cache)))
            assert len(_recordings(model)) == min(call, 1)
        graph = next(iter(replay._KEPT[model]._replayer._graphs.values()))
        assert isinstance(graph, torch.cuda.CUDAGraph)
        model.ln_f.weight.mul_(2)  # read where it lies
        ids = kept[0][0]
        doubled = model(ids, use_cache=use_cache)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            beside = model(ids, use_cache=use_cache)
        torch.cuda.current_stream().wait_stream(side)
        monkeypatch.setattr(replay, "ENABLED", False)
        for got in (doubled, beside):
            assert_same(got, model(ids, use_cache=use_cache))
        model.ln_f.weight.div_(2)
        for ids, got in kept:
            assert_same(got, model(ids, use_cache=use_cache))
