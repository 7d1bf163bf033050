"""`gpt2fast info`: the facts it states are those of this process."""

import importlib.util
import json
import os
import platform
from pathlib import Path

import pytest
import torch

from gpt2fast import __version__, info, kernels
from gpt2fast.checkpoint import sources
from gpt2fast.cli import main


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


def test_every_dispatched_op_is_listed_with_what_runs_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ops = facts(capsys)["ops"]
    assert set(ops.values()) == {"PyTorch"}
    assert set(ops) <= set(kernels.__all__)
    assert {"layer_norm", "gelu_mlp", "causal_attention", "attention_append"} <= set(ops)


def test_text_shows_what_json_holds(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert found["why"] in text
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


def test_a_cuda_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "NVIDIA H200", "capability": "9.0", "memory_bytes": 150 * 2**30}
    monkeypatch.setattr(info, "_devices", lambda: [gpu])
    found = info.collect()
    assert found["default_device"] == "cuda"
    assert "1 CUDA device" in found["why"]
    assert "GPU 0: NVIDIA H200, compute capability 9.0, 150 GiB" in info.report(found)
