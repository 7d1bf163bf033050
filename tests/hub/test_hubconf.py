"""The entry points of hubconf.py, through torch.hub, installed and not."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import pytorch_pretrained_bert as reference
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast import legacy
from tests.hub import hub_example
from tests.tolerances import assert_close

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {
    "gpt2Model": "GPT2Model",
    "gpt2LMHeadModel": "GPT2LMHeadModel",
    "gpt2DoubleHeadsModel": "GPT2DoubleHeadsModel",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*newly initialised. multiple_choice_head"),
    pytest.mark.filterwarnings("ignore:.*not used. (lm_head|multiple_choice_head)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model of the full vocabulary, as 0.6.2 wrote it, all heads in it."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"n_positions": 64, "n_ctx": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = reference.GPT2Config(50257, **sizes)
    torch.manual_seed(0)
    model = reference.GPT2DoubleHeadsModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.14)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config.to_json_file(str(folder / "config.json"))
    return folder


@pytest.fixture(params=["random", "bundled"])
def model_name(request: pytest.FixtureRequest, folder: Path) -> str:
    return str(folder) if request.param == "random" else request.param


def loader(model_name: str) -> hub_example.Load:
    """Our entry points, as the hub page calls them. A new head gets the same values each time."""

    def load(entry: str) -> Any:
        torch.manual_seed(0)
        name = "gpt2" if entry == "gpt2Tokenizer" else model_name
        return torch.hub.load(str(ROOT), entry, name, source="local")

    return load


def reference_loader(model_name: str) -> hub_example.Load:
    """0.6.2's models with the weights that ours loaded, and our tokenizer (its own needs files)."""

    def load(entry: str) -> Any:
        ours = loader(model_name)(entry)
        if entry == "gpt2Tokenizer":
            return ours
        theirs = getattr(reference, CLASSES[entry])(
            reference.GPT2Config.from_dict(ours.config.to_dict())
        )
        theirs.load_state_dict(ours.state_dict())
        return theirs

    return load


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert_close("model", "forward", ours, theirs)


def test_published_example(model_name: str) -> None:
    ours = hub_example.published_example(loader(model_name))
    theirs = hub_example.published_example(reference_loader(model_name))
    ids, width = ours["ids"], ours["hidden_states"][0].shape[-1]
    assert ids[0][:6] == [8241, 373, 5395, 367, 19069, 5633]
    assert [len(row) for row in ids] == [14, 14]
    assert ours["tokens"][0][:3] == ["Who", "\u0120was", "\u0120Jim"]
    assert ours["hidden_states"][1].shape == (1, 14, width)
    assert ours["predictions"][1].shape == (1, 14, 50257)
    assert {layer.shape[3] for layer in ours["past"]} == {28}
    assert ours["lm_logits"].shape == (1, 2, 14, 50257)
    assert ours["multiple_choice_logits"].shape == (1, 2)
    assert {layer.shape[1] for layer in ours["presents"]} == {2}
    for name in ("hidden_states", "predictions", "past", "presents"):
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert_same(mine, other)
    assert_same(ours["lm_logits"], theirs["lm_logits"])
    assert_same(ours["multiple_choice_logits"], theirs["multiple_choice_logits"])
    assert isinstance(ours["predicted_token"], str)
    assert ours["predicted_token"] == theirs["predicted_token"]


def test_texts_of_different_lengths(model_name: str) -> None:
    """Padding changes nothing: each choice scores and predicts as it does alone."""
    got = hub_example.padded_example(loader(model_name))
    lengths = [len(ids) for ids in got["ids"]]
    assert len(set(lengths)) == 3
    for choice, (length, (logits, score, _)) in enumerate(zip(lengths, got["alone"], strict=True)):
        assert_same(got["lm_logits"][0, choice, :length], logits[0, 0])
        assert_same(got["multiple_choice_logits"][0, choice], score[0, 0])
    rows = [logits[0, 0, :-1] for logits, _, _ in got["alone"]]
    targets = [torch.tensor(ids[1:]) for ids in got["ids"]]
    assert_same(got["losses"][0], F.cross_entropy(torch.cat(rows), torch.cat(targets)))
    scores = got["multiple_choice_logits"]
    assert_same(got["losses"][1], F.cross_entropy(scores, torch.tensor([0])))


@pytest.mark.parametrize("entry", CLASSES)
def test_entry_points_load_what_the_reference_does(entry: str, folder: Path) -> None:
    model = torch.hub.load(str(ROOT), entry, str(folder), source="local")
    assert type(model) is getattr(legacy, CLASSES[entry])
    assert model.training
    theirs = reference.GPT2DoubleHeadsModel.from_pretrained(str(folder))
    if entry == "gpt2Model":  # 0.6.2 takes nothing out of a dump with prefixed names
        theirs = theirs.transformer
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_entry_points_pass_keywords_on(folder: Path) -> None:
    model = torch.hub.load(
        str(ROOT), "gpt2LMHeadModel", str(folder), num_special_tokens=2, source="local"
    )
    assert model.config.total_tokens_embeddings == 50259
    tokenizer = torch.hub.load(
        str(ROOT), "gpt2Tokenizer", "gpt2", special_tokens=["<a>", "<b>"], max_len=9, source="local"
    )
    assert tokenizer.special_tokens == {"<a>": 50257, "<b>": 50258}
    assert tokenizer.max_len == 9


def test_what_is_missing_raises(tmp_path: Path) -> None:
    for entry in ("gpt2Tokenizer", *CLASSES):
        with pytest.raises(FileNotFoundError):
            torch.hub.load(str(ROOT), entry, str(tmp_path / "nowhere"), source="local")


def test_entry_points_are_the_hub_page_s() -> None:
    """By the rule of `torch.hub.list`, which itself takes no local folder."""
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    entries = {
        name: value
        for name, value in vars(hubconf).items()
        if callable(value) and not name.startswith("_")
    }
    assert entries.keys() == {"gpt2Tokenizer", *CLASSES}
    assert all("from_pretrained" in entry.__doc__ for entry in entries.values())


def test_dependencies_are_the_package_s() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    required = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    hubconf = (ROOT / "hubconf.py").read_text()
    declared = re.search(r"^dependencies = (\[.*?\])$", hubconf, re.MULTILINE)[1]
    assert json.loads(declared) == re.findall(r'"([\w-]+)', required)


def test_a_missing_dependency_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch.hub, which comes to it only if importing hubconf.py needs none of them."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "regex" else find_spec(name, *rest),
    )
    monkeypatch.setitem(sys.modules, "gpt2fast", None)
    with pytest.raises(RuntimeError, match="Missing dependencies: regex"):
        torch.hub.load(str(ROOT), "gpt2Model", "gpt2", source="local")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torch.hub unpacks: the repository's files, without any build or installation."""
    copy = tmp_path_factory.mktemp("hub") / "gpt2fast_main"
    copy.mkdir()
    for room in ("gpt2fast", "kernels", "tokenizer"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("hubconf.py", "setup.py"):
        shutil.copy(ROOT / name, copy)
    return copy


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A new interpreter that reads no ``.pth`` file, so that no editable install is seen."""
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(dependencies),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_uninstalled_copy(checkout: Path, folder: Path, tmp_path: Path) -> None:
    missing = run("-c", "import gpt2fast", cwd=tmp_path)
    assert "No module named 'gpt2fast'" in missing.stderr
    models = [str(folder), "bundled"]
    done = run(hub_example.__file__, str(checkout), *models, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *examples, (modules, strays, left_on_path) = map(json.loads, done.stdout.splitlines())
    assert modules > 10
    assert strays == []
    assert not left_on_path
    for model, (token, total) in zip(models, examples, strict=True):
        expected = hub_example.published_example(loader(model))
        assert token == expected["predicted_token"]
        assert total == pytest.approx(expected["predictions"][1].sum().item(), rel=1e-4)
