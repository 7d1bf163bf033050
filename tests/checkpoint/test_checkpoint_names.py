"""State dicts of every published form, into every model."""

import re

import pytest
import torch
import transformers
from pytorch_pretrained_bert import modeling_gpt2 as reference

from gpt2fast import GPT2Config, GPT2DoubleHeadsModel, GPT2LMHeadModel, GPT2Model
from gpt2fast.checkpoint import CheckpointError
from gpt2fast.checkpoint.names import canonical_name

MODELS = [GPT2Model, GPT2LMHeadModel, GPT2DoubleHeadsModel]
HEADS = ("lm_head.", "multiple_choice_head.")


def _prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def _bare(state):
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def _old_leaves(state):
    """The names of the first conversion from TensorFlow."""
    renamed = {}
    for name, tensor in state.items():
        if ".ln_" in name or name.startswith("transformer.ln_f"):
            name = re.sub("weight$", "g", name)
        if ".c_" in name:
            name = re.sub("weight$", "w", name)
        if ".h." in name or ".ln_f." in name:
            name = re.sub("bias$", "b", name)
        renamed[name] = tensor
    assert {name.rpartition(".")[2] for name in renamed} == {"g", "b", "w", "weight", "bias"}
    return renamed


def _old_heads(state):
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("lm_head.weight", "lm_head.decoder.weight")
        renamed[name.replace("multiple_choice_head.summary", "multiple_choice_head.linear")] = (
            tensor
        )
    return renamed


def _with_buffers(state):
    mask = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
    buffers = {}
    for layer in range(2):
        buffers[f"transformer.h.{layer}.attn.bias"] = mask
        buffers[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return {**state, **buffers}


FORMS = {
    "modern": lambda state: state,
    "bare": _bare,
    "data parallel": lambda state: _prefixed("module.", state),
    "compiled": lambda state: _prefixed("_orig_mod.", state),
    "wrapped": lambda state: _prefixed("model.", state),
    "compiled inside data parallel": lambda state: _prefixed("module._orig_mod.", state),
    "old leaves": _old_leaves,
    "old leaves, bare": lambda state: _bare(_old_leaves(state)),
    "old heads": _old_heads,
    "mask buffers": _with_buffers,
    "mask buffers, bare": lambda state: _bare(_with_buffers(state)),
}


@pytest.mark.filterwarnings("ignore:.*not used")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", MODELS)
def test_every_form_loads_into_every_model(cls, form, double_heads, save_pickle):
    state = double_heads.state_dict()
    folder = save_pickle(FORMS[form](state))
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == set()
    has = model.state_dict()
    prefix = "" if cls is GPT2Model else "transformer."
    expected = {
        prefix + name.removeprefix("transformer.") if name.startswith("transformer.") else name: t
        for name, t in state.items()
    }
    for name, tensor in has.items():
        assert torch.equal(tensor, expected[name]), name
    left_over = {canonical_name(name) for name in info["unexpected_keys"]}
    assert left_over == expected.keys() - has.keys()
    assert all(name.startswith(HEADS) for name in left_over)


@pytest.mark.parametrize("form", FORMS)
def test_load_state_dict_takes_every_form_strictly(form, double_heads, config):
    model = GPT2DoubleHeadsModel(config)
    result = model.load_state_dict(FORMS[form](double_heads.state_dict()))
    assert result.missing_keys == result.unexpected_keys == []
    for name, tensor in double_heads.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_load_state_dict_assign_keeps_the_tie(lm, config):
    state = {name: tensor.half() for name, tensor in lm.state_dict().items()}
    model = GPT2LMHeadModel(config)
    model.load_state_dict(state, assign=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.dtype == torch.float16


def test_load_state_dict_without_the_tied_head(lm, config):
    state = lm.state_dict()
    del state["lm_head.weight"]
    model = GPT2LMHeadModel(config)
    model.load_state_dict(state)
    assert torch.equal(model.lm_head.weight, lm.lm_head.weight)


def test_load_state_dict_is_strict_about_what_is_not_there(lm, base, config):
    state = lm.state_dict()
    del state["transformer.h.1.ln_1.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*transformer\.h\.1\.ln_1\.bias"):
        GPT2LMHeadModel(config).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*score\.weight"):
        base.load_state_dict({**base.state_dict(), "score.weight": torch.zeros(2, 16)})


def test_load_state_dict_refuses_a_head_that_contradicts_the_tie(lm):
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    state["lm_head.weight"] += 1
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight and transformer\.wte\.weight differ"
    ):
        lm.load_state_dict(state)


def test_a_head_that_contradicts_the_tie_needs_the_tie_given_up(lm, save_pickle):
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    state["lm_head.weight"] += 1
    folder = save_pickle(state)
    with pytest.raises(CheckpointError, match="tie_word_embeddings=False"):
        GPT2LMHeadModel.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder, tie_word_embeddings=False)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(model.transformer.wte.weight, state["transformer.wte.weight"])


def test_an_equal_copy_of_the_tied_head_is_one_parameter(lm, save_pickle):
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    model = GPT2LMHeadModel.from_pretrained(save_pickle(state))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_head_stands_in_for_a_missing_embedding(lm, save_pickle):
    state = lm.state_dict()
    head = state["lm_head.weight"]
    del state["transformer.wte.weight"]
    model, info = GPT2LMHeadModel.from_pretrained(save_pickle(state), output_loading_info=True)
    assert info["missing_keys"] == set()
    assert torch.equal(model.transformer.wte.weight, head)


def test_two_names_of_one_parameter_are_refused(base, save_pickle):
    state = base.state_dict()
    state["transformer.ln_f.g"] = state["ln_f.weight"]
    with pytest.raises(CheckpointError, match=r"'ln_f.weight' and 'transformer.ln_f.g'"):
        GPT2Model.from_pretrained(save_pickle(state))


def test_missing_heads_are_initialised_as_a_new_models_and_named(lm, saved):
    with pytest.warns(
        UserWarning, match=r"newly initialised.*multiple_choice_head\.summary\.bias"
    ) as w:
        model, info = GPT2DoubleHeadsModel.from_pretrained(saved, output_loading_info=True)
    assert w[0].filename == __file__
    assert info["missing_keys"] == {
        "multiple_choice_head.summary.weight",
        "multiple_choice_head.summary.bias",
    }
    summary = model.multiple_choice_head.summary
    assert torch.equal(summary.bias, torch.zeros(1))
    assert 0.01 < summary.weight.std() < 0.04
    assert summary.weight.requires_grad


def test_missing_parameters_are_initialised_as_a_new_models(lm, save_pickle):
    state = lm.state_dict()
    names = {
        "transformer.h.1.ln_2.weight": (1.0, 0.0),
        "transformer.h.0.mlp.c_fc.bias": (0.0, 0.0),
        "transformer.h.0.mlp.c_fc.weight": (0.0, 0.02),
        "transformer.h.0.mlp.c_proj.weight": (0.0, 0.02 / 2),  # 1/sqrt(2 n_layer)
    }
    for name in names:
        del state[name]
    with pytest.warns(UserWarning, match="newly initialised"):
        model, info = GPT2LMHeadModel.from_pretrained(
            save_pickle(state), output_loading_info=True, dtype=torch.float16
        )
    assert info["missing_keys"] == names.keys()
    for name, (mean, std) in names.items():
        parameter = model.get_parameter(name)
        assert parameter.dtype == torch.float16
        assert parameter.float().mean().item() == pytest.approx(mean, abs=0.003)
        assert parameter.float().std().item() == pytest.approx(std, rel=0.15)


def test_dump_of_pytorch_pretrained_bert(tmp_path):
    old_config = reference.GPT2Config(61, n_positions=16, n_ctx=16, n_embd=16, n_layer=2, n_head=2)
    ids = torch.randint(0, 61, (2, 3, 7))
    old = reference.GPT2DoubleHeadsModel(old_config).eval()
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.normal_(0.0, 0.3)
        old_config.to_json_file(tmp_path / "config.json")
        torch.save(old.state_dict(), tmp_path / "pytorch_model.bin")
        model, info = GPT2DoubleHeadsModel.from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == info["unexpected_keys"] == set()
        mc_token_ids = torch.tensor([[6, 2, 4], [1, 6, 6]])
        lm_logits, mc_logits, _ = old(ids, mc_token_ids)
        out = model(ids, mc_token_ids=mc_token_ids)
    torch.testing.assert_close(out.logits, lm_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.mc_logits, mc_logits, rtol=1e-5, atol=1e-5)


def test_state_dicts_interchange_with_transformers(lm, config):
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_dict())).eval()
    theirs.load_state_dict(lm.state_dict())
    ids = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, lm(ids).logits, rtol=1e-5, atol=1e-5)
    ours = GPT2LMHeadModel(GPT2Config(**config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
