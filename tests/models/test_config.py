"""GPT2Config: presets, names old and new, JSON both ways, and what it refuses."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gpt2fast
from gpt2fast import GPT2Config
from gpt2fast.config import ACTIVATIONS, PRESETS
from tests.models.reference import sizes


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = GPT2Config().to_dict(), transformers.GPT2Config().to_dict()
    assert {name: theirs[name] for name in ours} == ours


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("distilgpt2", 81_912_576),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets(name: str, parameters: int) -> None:
    config = GPT2Config.preset(name)
    with torch.device("meta"):
        model = gpt2fast.GPT2LMHeadModel(config)
    assert model.num_parameters() == parameters
    assert model.config.head_size == 64
    assert set(PRESETS) == {"distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}


def test_preset_with_overrides() -> None:
    config = GPT2Config.preset("gpt2-medium", n_layer=2, resid_pdrop=0.0)
    assert (config.n_embd, config.n_layer, config.resid_pdrop) == (1024, 2, 0.0)
    assert GPT2Config.preset("gpt2-medium").n_layer == 24


def test_unknown_preset() -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        GPT2Config.preset("gpt3")
    assert str(error.value) == (
        "unknown preset 'gpt3'; known: distilgpt2, gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    )


ALIASES = {
    "hidden_size": ("n_embd", 96),
    "num_hidden_layers": ("n_layer", 5),
    "num_attention_heads": ("n_head", 6),
    "max_position_embeddings": ("n_positions", 77),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias: str) -> None:
    name, value = ALIASES[alias]
    fields = {"n_embd": 96, "n_head": 6}
    fields.pop(name, None)
    config = GPT2Config(**{**fields, alias: value})
    assert getattr(config, name) == getattr(config, alias) == value
    assert alias not in config.to_dict()
    setattr(config, alias, value + 1)
    assert getattr(config, name) == value + 1
    with pytest.raises(ValueError, match=rf"^{alias}={value} contradicts {name}={value + 6}$"):
        GPT2Config(**{alias: value, name: value + 6})


def test_extra_fields_are_kept() -> None:
    extra = {"architectures": ["GPT2LMHeadModel"], "task_specific_params": {"a": {"b": 1}}}
    config = GPT2Config.from_dict({**sizes(), **extra, "n_ctx": 1024})
    assert config.n_ctx == 1024
    assert config.architectures == ["GPT2LMHeadModel"]
    assert extra.items() <= config.to_dict().items()
    with pytest.raises(AttributeError, match=r"^GPT2Config has no field 'absent'$"):
        _ = config.absent


def test_json_round_trip(tmp_path: Path) -> None:
    config = GPT2Config(**sizes(n_inner=100, layer_norm_epsilon=1e-6, extra=[1, None, "é"]))
    path = tmp_path / "config.json"
    config.to_json_file(path)
    assert GPT2Config.from_json_file(path) == config
    assert json.loads(config.to_json_string()) == config.to_dict()
    assert config.to_dict()["model_type"] == "gpt2"
    assert GPT2Config.from_json_file(path, n_layer=9).n_layer == 9
    assert repr(config) == f"GPT2Config {config.to_json_string()}"


def test_copies_and_equality() -> None:
    config = GPT2Config(**sizes(extra={"a": 1}))
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert other is not config
    assert config != GPT2Config(**sizes())
    assert config != config.to_dict()


def test_transformers_reads_ours(tmp_path: Path) -> None:
    config = GPT2Config(**sizes(n_inner=100, scale_attn_by_inverse_layer_idx=True))
    config.to_json_file(tmp_path / "config.json")
    theirs = transformers.GPT2Config.from_pretrained(tmp_path)
    fields = config.to_dict()
    assert {name: getattr(theirs, name) for name in fields} == fields


@pytest.mark.parametrize("complete", [False, True])
def test_we_read_those_of_transformers(complete: bool, tmp_path: Path) -> None:
    """As saved (differences alone) and in full, with fields that are none of ours."""
    theirs = transformers.GPT2Config(**sizes(n_inner=100, summary_type="mean"))
    path = tmp_path / "config.json"
    theirs.to_json_file(path, use_diff=not complete)
    ours = GPT2Config.from_json_file(path)
    for name, value in vars(GPT2Config(**sizes(n_inner=100, summary_type="mean"))).items():
        assert getattr(ours, name) == value, name
    assert ("id2label" in ours.to_dict()) == complete


def test_we_read_the_first_generation() -> None:
    """The configuration file that was published with the weights in 2019."""
    fields = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
    }
    config = GPT2Config.from_dict(fields)
    assert config.n_ctx == 1024
    assert config.to_dict() == {**GPT2Config().to_dict(), "n_ctx": 1024}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_has_a_model(name: str) -> None:
    with torch.device("meta"):
        gpt2fast.GPT2Model(GPT2Config(**sizes(activation_function=name)))


def test_derived_sizes_and_scales() -> None:
    config = GPT2Config(**sizes())
    assert (config.head_size, config.inner_size) == (12, 192)
    assert GPT2Config(**sizes(n_inner=100)).inner_size == 100
    assert config.attention_scale(2) == 12**-0.5
    assert GPT2Config(**sizes(scale_attn_weights=False)).attention_scale(2) == 1.0
    by_layer = GPT2Config(**sizes(scale_attn_by_inverse_layer_idx=True))
    assert by_layer.attention_scale(2) == pytest.approx(12**-0.5 / 3)


NAN = float("nan")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer; got 0"),
        ({"n_layer": -1}, "n_layer must be a positive integer; got -1"),
        ({"n_embd": 64.0}, "n_embd must be a positive integer; got 64.0"),
        ({"n_head": True}, "n_head must be a positive integer; got True"),
        ({"n_positions": "9"}, "n_positions must be a positive integer; got '9'"),
        ({"n_inner": 0}, "n_inner must be a positive integer; got 0"),
        ({"n_embd": 50}, "n_embd must be a multiple of n_head; got n_embd=50, n_head=4"),
        ({"resid_pdrop": 1.5}, "resid_pdrop must be a probability between 0 and 1; got 1.5"),
        ({"attn_pdrop": NAN}, "attn_pdrop must be a probability between 0 and 1; got nan"),
        ({"embd_pdrop": None}, "embd_pdrop must be a probability between 0 and 1; got None"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon must be between 0 and 1; got 0"),
        ({"initializer_range": -0.1}, "initializer_range must be at least 0; got -0.1"),
        ({"initializer_range": float("inf")}, "initializer_range must be at least 0; got inf"),
        ({"use_cache": 1}, "use_cache must be true or false; got 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false; got 'no'"),
        (
            {"activation_function": "gelu2"},
            "activation_function must be one of gelu_new, gelu_pytorch_tanh, gelu_fast, gelu, "
            "relu, silu, swish, tanh, sigmoid; got 'gelu2'",
        ),
        (
            {"summary_type": "attn"},
            "summary_type must be one of last, first, mean, cls_index; got 'attn'",
        ),
        ({"summary_activation": "relu"}, "summary_activation must be 'tanh' or None; got 'relu'"),
        ({"pad_token_id": 0.5}, "pad_token_id must be an integer or None; got 0.5"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id must be an integer or None; got '2'"),
        (
            {"add_cross_attention": True},
            "add_cross_attention=True is not supported: no GPT-2 was published so",
        ),
        ({"to_dict": 1}, "'to_dict' cannot be a field: GPT2Config needs the name"),
        ({"head_size": 64}, "'head_size' cannot be a field: GPT2Config needs the name"),
    ],
    ids=str,
)
def test_impossible_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        GPT2Config(**sizes(**fields))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a JSON configuration: "),
        ('{"n_embd": ', "is not a JSON configuration: "),
        ("[" * 100_000, "is not a JSON configuration: "),
        ("[1]", "a configuration must be a mapping; got list"),
        (
            '{"model_type": "bert"}',
            "expected a configuration of model_type 'gpt2'; got 'bert'",
        ),
    ],
    ids=["empty", "cut off", "deep", "list", "bert"],
)
def test_files_that_are_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        GPT2Config.from_json_file(path)
    assert message in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GPT2Config.from_json_file(tmp_path / "absent.json")


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel"])
def test_models_take_a_configuration_of_transformers(kind: str) -> None:
    theirs = transformers.GPT2Config(**sizes(scale_attn_by_inverse_layer_idx=True))
    model = getattr(gpt2fast, kind)(theirs)
    assert isinstance(model.config, GPT2Config)
    assert model.config.scale_attn_by_inverse_layer_idx
    model.load_state_dict(getattr(transformers, kind)(theirs).state_dict())
    with pytest.raises(TypeError, match=r"^expected a GPT2Config; got dict$"):
        getattr(gpt2fast, kind)({"n_layer": 2})
