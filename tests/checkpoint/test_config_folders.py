"""GPT2Config.from_pretrained and save_pretrained."""

from pathlib import Path

import pytest
import transformers

from gpt2fast import GPT2Config, legacy


def test_a_folder_goes_both_ways(tmp_path: Path) -> None:
    GPT2Config(n_layer=3, resid_pdrop=0.2).save_pretrained(tmp_path / "made" / "here")
    theirs = transformers.GPT2Config.from_pretrained(tmp_path / "made" / "here")
    assert (theirs.n_layer, theirs.resid_pdrop) == (3, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT2Config.from_pretrained(str(tmp_path), subfolder="theirs", n_layer=5)
    assert (ours.n_layer, ours.resid_pdrop) == (5, 0.2)


def test_the_legacy_class(tmp_path: Path) -> None:
    GPT2Config(n_positions=77).save_pretrained(tmp_path)
    assert legacy.GPT2Config.from_pretrained(tmp_path).n_ctx == 77


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found no config\.json in the folder"):
        GPT2Config.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"found no config\.json of gpt2-nowhere"):
        GPT2Config.from_pretrained(
            "gpt2-nowhere", local_files_only=True, cache_dir=tmp_path / "cache"
        )
