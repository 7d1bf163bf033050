"""`gpt2fast info`: the facts it states are those of this process."""

import importlib
import importlib.util
import json
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt2fast import __version__, info, kernels
from gpt2fast.checkpoint import sources
from gpt2fast.cli import main
from gpt2fast.kernels.backend import unavailable
from gpt2fast.kernels.quantized import int8_ops


def facts(capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_versions_device_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys)
    assert found["gpt2fast"] == __version__
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__
    assert (found["packages"]["triton"] is None) == (importlib.util.find_spec("triton") is None)
    assert found["default_device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert len(found["cuda"]) == torch.cuda.device_count()
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()


def test_threads_are_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert facts(capsys)["cpu"]["threads_why"] == "OMP_NUM_THREADS=1"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "PyTorch" in facts(capsys)["cpu"]["threads_why"]


def test_every_op_is_listed_with_what_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys)
    ops = found["ops"]
    assert set(ops) <= set(kernels.__all__)
    assert {"layer_norm", "gelu_mlp", "causal_attention", "attention_append"} <= set(ops)
    assert found["backend"] == "auto"
    assert set(ops.values()) == {"Triton" if found["cuda"] else "PyTorch"}


def test_a_backend_chosen_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    with kernels.backend("triton"):
        found = facts(capsys)
    assert found["backend"] == "triton"
    assert set(found["ops"].values()) == {"Triton"}
    assert "our kernels run" in found["why"]
    with kernels.backend("torch"):
        found = facts(capsys)
    assert set(found["ops"].values()) == {"PyTorch"}
    assert "by hand" in found["why"]


def test_what_runs_the_steps_of_generate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = facts(capsys)
    runner = "our kernels in CUDA graphs" if found["cuda"] else "PyTorch's operators"
    assert found["engine"].startswith(runner)
    with kernels.backend("torch" if found["cuda"] else "triton"):
        assert facts(capsys)["engine"].startswith("none (")
    if not found["cuda"]:
        module = importlib.import_module("gpt2fast.kernels.backend")
        monkeypatch.setattr(module, "unavailable", lambda *_: "Triton is not installed")
        with kernels.backend("triton"):
            assert "but Triton is not installed" in facts(capsys)["engine"]


def test_text_shows_what_json_holds(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert found["why"] in text
    assert found["engine"] in text
    assert found["int8"] is None or found["int8"].split(",")[0] in int8_ops()
    assert (found["int8"] or "dequantised at every call") in text
    assert f"device: {found['default_device']}" in text
    for name in (*found["ops"], *found["checkpoints"], found["packages"]["torch"]):
        assert name in text


def write_gpt2(folder: Path, **fields: object) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"n_embd": 8, **fields}))
    (folder / "model.safetensors").touch()


def test_checkpoints_in_the_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", os.fspath(tmp_path))
    monkeypatch.setattr(sources, "BUNDLED_FOLDER", tmp_path / "nowhere")
    assert facts(capsys)["checkpoints"] == {"bundled": None}

    good = tmp_path / "models--openai-community--gpt2" / "snapshots" / "abc"
    write_gpt2(good)
    write_gpt2(tmp_path / "models--some--bert" / "snapshots" / "abc", model_type="bert")
    incomplete = tmp_path / "models--some--config-only" / "snapshots" / "abc"
    write_gpt2(incomplete)
    (incomplete / "model.safetensors").unlink()
    damaged = tmp_path / "models--some--damaged" / "snapshots" / "abc"
    write_gpt2(damaged)
    (damaged / "config.json").write_text("{")
    monkeypatch.setattr(sources, "BUNDLED_FOLDER", good)
    assert facts(capsys)["checkpoints"] == {
        "bundled": os.fspath(good),
        "openai-community/gpt2": os.fspath(good),
    }


@pytest.mark.parametrize(("major", "runs"), [(9, "Triton"), (7, "PyTorch")])
def test_a_cuda_device_is_named(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, major: int, runs: str
) -> None:
    gpu = SimpleNamespace(name="NVIDIA H200", major=major, minor=0, total_memory=150 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    unavailable.cache_clear()
    request.addfinalizer(unavailable.cache_clear)
    found = info.collect()
    assert found["default_device"] == "cuda"
    assert found["ops"]["causal_attention"] == runs
    assert ("the kernels need 8.0" in found["why"]) == (runs == "PyTorch")
    text = info.report(found)
    assert f"GPU 0: NVIDIA H200, compute capability {major}.0, 150 GiB" in text
    assert "device: cuda, backend: auto" in text


def test_the_compiler_of_steps_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert facts(capsys)["compiler"] is None
    (tmp_path / "g++").touch(mode=0o755)
    assert facts(capsys)["compiler"] == str(tmp_path / "g++")
    assert main(["info"]) == 0
    assert f"C++ compiler for compile_decoding: {tmp_path / 'g++'}" in capsys.readouterr().out
