"""State dicts and folders, both ways between this package and pytorch-pretrained-BERT 0.6.2."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_pretrained_bert as reference
import torch
from torch import Tensor, nn

import gpt2fast
from gpt2fast import legacy

Pair = tuple[nn.Module, nn.Module]
NAMES = ["GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel"]
IDS = torch.tensor([[5, 200, 17, 3, 42]])


def hidden_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return getattr(model, "transformer", model)(IDS)[0]


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    expected = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == expected.keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def old_names(state_dict: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The leaves of the first conversions from TensorFlow."""

    def old(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        if leaf == "bias":
            return f"{module}.b"
        return f"{module}.{'g' if '.ln_' in f'.{module}' else 'w'}"

    plain = {name for name in state_dict if name.endswith("attn.bias")}
    return {
        prefix + (name if name in plain else old(name)): tensor
        for name, tensor in state_dict.items()
    }


@pytest.fixture
def write(tmp_path: Path, config: legacy.GPT2Config) -> Callable[[dict[str, Tensor]], Path]:
    """A folder as 0.6.2 wrote it."""

    def folder(state_dict: dict[str, Tensor]) -> Path:
        theirs = reference.GPT2Config(config.vocab_size)
        for field in vars(theirs):
            setattr(theirs, field, getattr(config, field))
        theirs.to_json_file(str(tmp_path / "config.json"))
        torch.save(state_dict, tmp_path / "pytorch_model.bin")
        return tmp_path

    return folder


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_load_strictly_both_ways(name: str, make_pair: Callable[..., Pair]) -> None:
    ours, theirs = make_pair(name)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == {
        key: tuple(value.shape) for key, value in theirs.state_dict().items()
    }
    fresh = getattr(legacy, name)(ours.config)
    fresh.load_state_dict(theirs.state_dict())
    assert_same_weights(fresh, theirs)
    fields = {"n_positions": 40, "n_ctx": 40, "n_embd": 64, "n_layer": 3, "n_head": 4}
    fresh = getattr(reference, name)(reference.GPT2Config(211, **fields))
    fresh.load_state_dict(ours.state_dict(), strict=True)
    assert_same_weights(ours, fresh)
    torch.testing.assert_close(hidden_of(ours), hidden_of(fresh))


@pytest.mark.parametrize("name", NAMES)
def test_a_module_around_it_loads_what_it_saved(name: str, make_pair: Callable[..., Pair]) -> None:
    ours, theirs = make_pair(name)
    outer = nn.ModuleDict({"gpt2": copy.deepcopy(ours)})
    dump = copy.deepcopy(outer.state_dict())
    assert "gpt2.h.1.attn.bias" in dump or "gpt2.transformer.h.1.attn.bias" in dump
    nn.ModuleDict({"gpt2": theirs}).load_state_dict(dump)
    with torch.no_grad():
        for parameter in outer.parameters():
            parameter.zero_()
    outer.load_state_dict(dump)
    assert_same_weights(outer["gpt2"], theirs)


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_the_reference(
    name: str, make_pair: Callable[..., Pair], write: Callable[..., Path]
) -> None:
    _, theirs = make_pair(name)
    folder = write(theirs.state_dict())
    loaded = getattr(legacy, name).from_pretrained(str(folder))
    assert_same_weights(loaded, getattr(reference, name).from_pretrained(str(folder)))
    assert loaded.training
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_reads_ours(
    name: str, make_pair: Callable[..., Pair], tmp_path: Path
) -> None:
    ours, _ = make_pair(name)
    torch.save(ours.state_dict(), tmp_path / "pytorch_model.bin")
    ours.config.to_json_file(tmp_path / "config.json")
    assert_same_weights(ours, getattr(reference, name).from_pretrained(str(tmp_path)))


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*newly initialised. multiple_choice_head:UserWarning")
def test_old_dumps(
    name: str, prefix: str, make_pair: Callable[..., Pair], write: Callable[..., Path]
) -> None:
    theirs, dump = make_pair("GPT2Model")[1], {}
    dump = old_names(theirs.state_dict(), prefix)
    folder = write(dump)
    cls = getattr(legacy, name)
    for model in (cls.from_pretrained(folder), cls.from_pretrained(folder, dump)):
        assert_same_weights(getattr(model, "transformer", model), theirs)
        if name != "GPT2Model":
            assert model.lm_head.decoder.weight is model.transformer.wte.weight
    if not prefix:  # where it is prefixed 0.6.2 loads nothing, and does not say so
        assert_same_weights(reference.GPT2Model.from_pretrained(str(folder)), theirs)


def test_old_dump_into_an_existing_model(make_pair: Callable[..., Pair]) -> None:
    _, theirs = make_pair("GPT2Model")
    fresh = legacy.GPT2Model(legacy.GPT2Config.from_dict(vars(theirs.config)))
    fresh.load_state_dict(old_names(theirs.state_dict()))
    assert_same_weights(fresh, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_modern_and_legacy_models_load_each_other_s_weights(
    name: str, make_pair: Callable[..., Pair], tmp_path: Path
) -> None:
    ours, _ = make_pair(name)
    modern_class = getattr(gpt2fast, name)
    modern = modern_class(gpt2fast.GPT2Config.from_dict(ours.config.to_dict()))
    modern.load_state_dict(ours.state_dict())
    ids = IDS[:, None] if name == "GPT2DoubleHeadsModel" else IDS
    rest = (torch.tensor([[4]]),) if name == "GPT2DoubleHeadsModel" else ()
    expected = modern.eval()(ids)
    for got, other in zip(ours(ids, *rest)[:-1], expected.to_tuple()[:-1], strict=True):
        assert torch.equal(got, other)
    modern.half().save_pretrained(tmp_path)
    loaded = getattr(legacy, name).from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for mine, parameter in zip(ours.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine.half().float(), parameter)


def test_given_state_dict_is_neither_changed_nor_shared(
    make_pair: Callable[..., Pair], write: Callable[..., Path]
) -> None:
    _, theirs = make_pair("GPT2LMHeadModel")
    dump = old_names(theirs.state_dict())
    names, folder = list(dump), write({})
    model = legacy.GPT2LMHeadModel.from_pretrained(str(folder), dump)
    assert list(dump) == names
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    assert theirs.transformer.wte.weight.abs().max() > 0


def test_a_new_head_is_announced(
    make_pair: Callable[..., Pair], write: Callable[..., Path]
) -> None:
    folder = write(make_pair("GPT2LMHeadModel")[1].state_dict())
    with pytest.warns(
        UserWarning, match="newly initialised: multiple_choice_head.linear.bias"
    ) as seen:
        model = legacy.GPT2DoubleHeadsModel.from_pretrained(folder)
    assert seen[0].filename == __file__
    assert 0.005 < model.multiple_choice_head.linear.weight.std() < 0.05
    assert not model.multiple_choice_head.linear.bias.any()


def test_what_is_missing_raises(tmp_path: Path) -> None:
    for name in NAMES:
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            getattr(legacy, name).from_pretrained(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        legacy.GPT2Model.from_pretrained(tmp_path / "elsewhere")


def test_tensorflow_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"from_tf=True: TensorFlow .* convert {str(tmp_path)!r}"):
        legacy.GPT2Model.from_pretrained(tmp_path, from_tf=True)


def test_fresh_weights_are_those_of_the_reference(config: legacy.GPT2Config) -> None:
    """All of one spread: nothing is scaled by depth."""
    config.n_embd = 256
    ours = legacy.GPT2DoubleHeadsModel(config)
    fields = {name: getattr(config, name) for name in ("n_embd", "n_layer", "n_head")}
    theirs = reference.GPT2DoubleHeadsModel(reference.GPT2Config(211, 40, 40, **fields))
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name.endswith("weight") and ".ln_" not in name and mine.numel() > 1000:
            torch.testing.assert_close(mine.std(), other.std(), rtol=0.1, atol=0)
            assert abs(mine.mean()) < 0.002
        elif "multiple_choice" not in name:
            assert torch.equal(mine, other), name


def test_number_of_parameters(config: legacy.GPT2Config) -> None:
    with torch.device("meta"):
        model = legacy.GPT2LMHeadModel(legacy.GPT2Config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    assert model.num_parameters() == 124_439_808


def test_configuration_file_of_the_reference(tmp_path: Path, config: legacy.GPT2Config) -> None:
    path = tmp_path / "config.json"
    theirs = reference.GPT2Config(97, n_positions=33, n_embd=12, n_layer=5, n_head=3)
    theirs.to_json_file(str(path))
    for ours in (legacy.GPT2Config(str(path)), legacy.GPT2Config.from_json_file(path)):
        assert vars(theirs).items() <= ours.to_dict().items()
        assert ours.n_special == 0
    config.to_json_file(path)
    read = reference.GPT2Config.from_json_file(str(path))
    assert json.loads(path.read_text()) == read.to_dict() == config.to_dict()
    assert json.loads(config.to_json_string()) == config.to_dict()


def test_saving_over_the_file_it_came_from(
    make_pair: Callable[..., Pair], write: Callable[..., Path]
) -> None:
    """The usual fine-tuning loop of that time: the model must not live in the mapped file."""
    _, theirs = make_pair("GPT2LMHeadModel")
    path = write(theirs.state_dict()) / "pytorch_model.bin"
    model = legacy.GPT2LMHeadModel.from_pretrained(path.parent)
    with path.open("r+b") as file:  # first in place: a process dies of pages that are cut off
        file.write(bytes(path.stat().st_size))
    assert_same_weights(model, theirs)
    torch.save(model.state_dict(), path)
    assert_same_weights(legacy.GPT2LMHeadModel.from_pretrained(path.parent), theirs)
