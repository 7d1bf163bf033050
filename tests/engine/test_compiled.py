"""Compiled decoding steps of int8 models: against float64, across processes, and on bad days."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast import Engine, GPT2LMHeadModel, compile_decoding, quantize
from gpt2fast.engine import compiled
from gpt2fast.engine.compiled import CompiledStep, Shape
from gpt2fast.kernels.packing import dequantize
from tests.engine.conftest import engine_of, make_model

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")

VOCAB, POSITIONS = 211, 320
PROMPT = [9, 100, 31, 7, 52, 200, 3, 45]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": []}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Files of this module alone, compiled for two threads, and thought to be the faster ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(compiled._Record, "is_faster", True)
        yield patch
    torch.set_num_threads(threads)


def floats() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return make_model(vocab_size=VOCAB, n_positions=POSITIONS, n_embd=64)


def fresh() -> GPT2LMHeadModel:
    return quantize(floats(), "int8")


@pytest.fixture(scope="module")
def model(home: pytest.MonkeyPatch) -> GPT2LMHeadModel:
    """Compiled; the tests of this module share the files."""
    model = fresh()
    assert compile_decoding(model) is model
    return model


@pytest.fixture(scope="module")
def exact(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The same weights in float64."""
    state = model.state_dict()
    floats = {}
    for name, tensor in state.items():
        scale = state.get(name.removesuffix("weight") + "scale")
        if name.endswith("scale"):
            continue
        if scale is not None:
            tensor = dequantize(tensor, scale, 8).double()
            tensor = tensor.t() if ".c_" in name else tensor
        floats[name] = tensor.double()
    reference = GPT2LMHeadModel(model.config).double().eval()
    reference.load_state_dict(floats)
    return reference


def compiled_step(model: GPT2LMHeadModel) -> CompiledStep:
    step = compiled.step_of(model)
    assert step is not None
    return step


def embedded(model: GPT2LMHeadModel, token: int, position: int) -> Tensor:
    body = model.transformer
    return body.wte(torch.tensor([token]))[0] + body.wpe.weight[position]


@torch.no_grad()
@pytest.mark.parametrize("capacity", [320, 301])
def test_logits_and_caches_are_those_of_float64(model, exact, capacity):
    step, config = compiled_step(model), model.config
    ids = torch.randint(config.vocab_size, (300,), generator=torch.Generator().manual_seed(0))
    out = exact(ids[None])
    past = torch.cat([layer[:, 0] for layer in out.past_key_values]).float()  # [2 L, H, T, D]
    for position in (1, 2, 8, 64, 299):
        cache = torch.full((len(past), config.n_head, capacity, config.head_size), torch.nan)
        cache[:, :, :position] = past[:, :, :position]
        logits = step(embedded(model, int(ids[position]), position), cache, position)
        assert logits.shape == (config.vocab_size,)
        right = out.logits[0, position]
        # The step of an activation is 1 / 5504 of the largest one or less.
        assert (logits - right).abs().max() < 2e-3 * right.abs().max()
        written = past[:, :, position]
        assert (cache[:, :, position] - written).abs().max() < 2e-3 * written.abs().max()
        assert torch.equal(cache[:, :, :position], past[:, :, :position])
        assert cache[:, :, position + 1 :].isnan().all()


@torch.no_grad()
def test_generates_what_the_weights_say(model, exact):
    found = model.generate([PROMPT], max_new_tokens=60, **GREEDY)[0].tolist()
    runner: Any = engine_of(model)._runner
    assert isinstance(runner._step, CompiledStep)
    logits = exact(torch.tensor([found])).logits[0, len(PROMPT) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(found[len(PROMPT) :])[:, None])[:, 0]
    assert (logits.amax(1) - chosen).max() < 5e-3 * logits.std()


def test_loading_leaves_the_process_its_arithmetic(model):
    compiled_step(model)
    smallest = torch.full((64,), 1e-40)
    assert (smallest * 0.5 > 0).all()
    assert 5e-324 * 1.0 > 0


def test_only_one_sequence_without_drafts_takes_the_step(model, monkeypatch):
    calls: list[int] = []
    run = CompiledStep.__call__

    def counted(self: CompiledStep, hidden: Tensor, cache: Tensor, past: int) -> Tensor:
        calls.append(past)
        return run(self, hidden, cache, past)

    monkeypatch.setattr(CompiledStep, "__call__", counted)
    with Engine(model, slots=2, capacity=64) as engine:
        first = engine.submit(PROMPT, max_new_tokens=12)
        second = engine.submit(PROMPT[:3], max_new_tokens=4)
        while engine.unfinished:
            engine.step()
    # Alone only after the other has its tokens.
    assert len(PROMPT) + 3 <= calls[0] <= len(PROMPT) + 5
    assert calls == list(range(calls[0], len(PROMPT) + 11))
    assert len(first.token_ids) == 12
    assert len(second.token_ids) == 4

    calls.clear()
    model.generate([PROMPT * 3], max_new_tokens=8, prompt_lookup_num_tokens=4, **GREEDY)
    lookups = len(calls)
    calls.clear()
    model.generate([PROMPT * 3], max_new_tokens=8, **GREEDY)
    assert lookups < len(calls) == 7
    calls.clear()
    model.generate([[5]], max_new_tokens=4, **GREEDY)
    assert calls == [1, 2, 3]


def test_the_last_position_of_a_full_cache_is_evaluated_too(model):
    with Engine(model, slots=1, capacity=len(PROMPT) + 6) as engine:
        runner: Any = engine._runner
        assert runner._step.serves(len(PROMPT) + 4, engine.capacity)
        assert not runner._step.serves(len(PROMPT) + 5, engine.capacity)
        full = engine.submit(PROMPT, max_new_tokens=20)
        while engine.unfinished:
            engine.step()
    assert full.finish_reason == "context"
    assert full.token_ids == model.generate([PROMPT], max_new_tokens=7, **GREEDY)[0, 8:].tolist()


def test_other_numbers_of_threads_go_the_other_way(model):
    step = compiled_step(model)
    assert step.serves(8, 64)
    torch.set_num_threads(1)
    try:
        assert not step.serves(8, 64)
        assert model.generate([PROMPT], max_new_tokens=3, **GREEDY).shape == (1, len(PROMPT) + 3)
        assert compiled.step_of(model) is None  # none was built for one thread
    finally:
        torch.set_num_threads(2)


def test_follows_a_model_that_changes(model):
    changed = copy.deepcopy(model)
    assert compiled.step_of(changed) is None  # a copy was not asked for
    compile_decoding(changed)
    before = changed.generate([PROMPT], max_new_tokens=8, **GREEDY)
    torch.manual_seed(1)
    other = quantize(make_model(vocab_size=VOCAB, n_positions=POSITIONS, n_embd=64), "int8")
    changed.load_state_dict(other.state_dict())
    compile_decoding(other)
    after = changed.generate([PROMPT], max_new_tokens=8, **GREEDY)
    assert torch.equal(after, other.generate([PROMPT], max_new_tokens=8, **GREEDY))
    assert not torch.equal(after, before)


def test_values_that_are_not_numbers_are_an_error(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.h[1].ln_2.bias[5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        compile_decoding(broken).generate([PROMPT], max_new_tokens=4, **GREEDY)


def test_another_process_needs_no_compiler(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    code = """
import json, sys, torch
torch.set_num_threads(2)
from gpt2fast import GPT2LMHeadModel, compile_decoding
from gpt2fast.engine import compiled
compiled._Record.is_faster = True
model = compile_decoding(GPT2LMHeadModel.from_pretrained(sys.argv[1]))
ids = model.generate([json.loads(sys.argv[2])], max_new_tokens=8, do_sample=False, eos_token_id=[])
assert compiled.step_of(model) is not None
print(json.dumps([ids[0].tolist(), "torch._inductor" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path / "saved", json.dumps(PROMPT)],
        env={**os.environ, "CXX": "no-such-compiler"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    tokens, compiles = json.loads(done.stdout)
    assert tokens == model.generate([PROMPT], max_new_tokens=8, **GREEDY)[0].tolist()
    assert not compiles


def test_without_a_compiler_a_warning_says_so(home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = fresh()
    with pytest.warns(UserWarning, match=r"not compiled: there is no C\+\+ compiler"):
        compile_decoding(model)
    assert compiled.step_of(model) is None
    assert model.generate([PROMPT], max_new_tokens=3, **GREEDY).shape == (1, len(PROMPT) + 3)
    assert list(tmp_path.rglob("*.pt2")) == []


def test_what_compiles_wrongly_or_not_at_all_is_not_kept(model, tmp_path, monkeypatch):
    folder = Shape.of(model).folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def wrong(shape: Shape, made: Path) -> None:
        for name in ("layer.pt2", "head.pt2"):
            (made / name).write_bytes((folder / name).read_bytes())

    monkeypatch.setattr(compiled, "_compile", wrong)
    monkeypatch.setattr(compiled.compiled_graph, "_normed", lambda x, norm, eps: 1.1 * x)
    with pytest.warns(UserWarning, match=r"not compiled: the compiled layer.pt2 is off by"):
        compile_decoding(fresh())

    def fails(*args: Any, **options: Any) -> None:
        raise ValueError("no such flag\nand much more")

    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    with pytest.warns(UserWarning, match=r"not compiled: no such flag$"):
        compile_decoding(fresh())
    assert list((tmp_path / "gpt2fast" / "compiled").iterdir()) == []


def copied(model: GPT2LMHeadModel, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model's files, in another home."""
    folder = Shape.of(model).folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    target = Shape.of(model).folder()
    target.mkdir(parents=True)
    for path in (target.parent, target):
        path.chmod(0o700)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
        (target / path.name).chmod(0o600)
    return target


def test_what_is_not_faster_is_not_used(model, tmp_path, monkeypatch):
    target = copied(model, tmp_path, monkeypatch)
    monkeypatch.setattr(
        compiled._Record, "is_faster", property(lambda self: self.compiled_ms < self.plain_ms)
    )
    record = {"plain_ms": 2.0, "compiled_ms": 3.5}
    (target / "record.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=r"here a token takes 3.5 ms so, and 2.0 ms without"):
        compile_decoding(model)
    assert compiled.step_of(model) is None


@pytest.mark.skipif(os.name != "posix", reason="owners and modes")
@pytest.mark.parametrize("name", ["", "layer.pt2"])
def test_files_that_others_may_have_written_are_not_executed(name, model, tmp_path, monkeypatch):
    target = copied(model, tmp_path, monkeypatch)
    (target / name).chmod(0o777)
    monkeypatch.setattr(compiled, "_build", lambda *args: None)
    with pytest.warns(UserWarning, match="does not belong to this user alone"):
        compile_decoding(model)
    assert compiled.step_of(model) is None


def test_damaged_files_are_named_and_left_alone(model, tmp_path, monkeypatch):
    target = copied(model, tmp_path, monkeypatch)
    whole = (target / "layer.pt2").read_bytes()
    (target / "layer.pt2").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=f"not compiled: {target}"):
        assert compiled.step_of(model) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: quantize(model, "fp16"), "not quantised to int8"),
        (lambda model: model, "not quantised to int8"),
        (lambda model: model.to("meta"), "meta"),
    ],
)
def test_other_models_are_refused(change, reason):
    model = change(floats())
    with pytest.raises(ValueError, match=f"cannot be compiled: .*{reason}"):
        compile_decoding(model)


def test_layers_that_scale_differently_are_refused():
    model = quantize(make_model(scale_attn_by_inverse_layer_idx=True), "int8")
    with pytest.raises(ValueError, match="scale attention"):
        compile_decoding(model)
