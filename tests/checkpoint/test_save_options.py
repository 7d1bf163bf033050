"""save_pretrained as training loops on accelerate call it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpt2fast import GPT2LMHeadModel


def _save(lm: GPT2LMHeadModel, folder: Path, **options: Any) -> None:
    lm.save_pretrained(folder, save_function=torch.save, safe_serialization=True, **options)


def test_only_the_main_process_writes(lm: GPT2LMHeadModel, tmp_path: Path) -> None:
    _save(lm, tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    _save(lm, tmp_path / "main", is_main_process=True)
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "main").config.n_embd == lm.config.n_embd


def test_a_state_dict_in_place_of_the_weights(lm: GPT2LMHeadModel, tmp_path: Path) -> None:
    gathered = {f"module.{name}": tensor + 1 for name, tensor in lm.state_dict().items()}
    _save(lm, tmp_path, state_dict=gathered)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).state_dict()
    for name, tensor in lm.state_dict().items():
        assert torch.equal(loaded[name], tensor + 1), name


def test_refused(lm: GPT2LMHeadModel, tmp_path: Path) -> None:
    state_dict = lm.state_dict()
    del state_dict["transformer.ln_f.bias"]
    with pytest.raises(ValueError, match=r"^state_dict lacks transformer\.ln_f\.bias$"):
        lm.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(ValueError, match="only safetensors"):
        lm.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_stored_in_half_and_loaded_as_it_was(lm: GPT2LMHeadModel, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path, storage_dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {
        torch.float16
    }
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    for name, parameter in lm.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.half().float()), name


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_files_are_as_readable_as_any_other(lm: GPT2LMHeadModel, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path)
    (tmp_path / "other").touch()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "other").stat().st_mode
