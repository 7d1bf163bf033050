"""from_pretrained and save_pretrained: formats, options, and transformers on the other side."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gpt2fast import GPT2Config, GPT2DoubleHeadsModel, GPT2LMHeadModel, GPT2Model
from gpt2fast.checkpoint import CheckpointError

NAMES = ["GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel"]
OURS = {cls.__name__: cls for cls in (GPT2Model, GPT2LMHeadModel, GPT2DoubleHeadsModel)}


def assert_same(model, expected):
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.fixture(params=NAMES)
def pair(request, config):
    """A class of ours, and a randomised model of transformers' class of that name."""
    theirs = getattr(transformers, request.param)(transformers.GPT2Config(**config.to_dict()))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.3)
    return OURS[request.param], theirs.eval()


@pytest.mark.parametrize("max_shard_size", ["10GB", "10KB"])
def test_reads_what_transformers_writes(pair, tmp_path, max_shard_size):
    cls, theirs = pair
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "10KB")
    ours, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    assert not ours.training
    ids = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_shard_size", [None, 10_000, "10KiB"])
def test_writes_what_transformers_reads(pair, tmp_path, max_shard_size):
    cls, theirs = pair
    ours = cls(GPT2Config(**theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    ours.eval().save_pretrained(tmp_path, max_shard_size=max_shard_size)
    again, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(ids)[0], ours(ids)[0], rtol=1e-5, atol=1e-5)
    assert_same(cls.from_pretrained(tmp_path), ours)


def test_what_is_written(lm, saved):
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {name for name, _ in lm.named_parameters()}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    fields = json.loads((saved / "config.json").read_text())
    assert fields["model_type"] == "gpt2"
    assert fields["architectures"] == ["GPT2LMHeadModel"]
    assert fields["dtype"] == "float32"


def test_shards_hold_every_tensor_once_within_the_limit(lm, tmp_path):
    lm.save_pretrained(tmp_path, max_shard_size=8000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    state = dict(lm.named_parameters())
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in state.values())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert sum(t.numel() * 4 for t in tensors.values()) <= 8000
        assert tensors.keys() == {n for n, s in index["weight_map"].items() if s == shard}


def test_saving_again_leaves_no_stale_shards(lm, tmp_path):
    lm.save_pretrained(tmp_path, max_shard_size=8000)
    (tmp_path / "model-card.safetensors.txt").write_text("not ours")
    with torch.no_grad():
        lm.transformer.ln_f.bias.add_(1)
    lm.save_pretrained(tmp_path)
    names = ["config.json", "model-card.safetensors.txt", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with torch.no_grad():
        lm.transformer.ln_f.bias.add_(1)
    lm.save_pretrained(tmp_path, max_shard_size=8000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(GPT2LMHeadModel.from_pretrained(tmp_path), lm)


def test_a_failed_save_leaves_the_old_checkpoint(lm, saved, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("gpt2fast.checkpoint.weights.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        lm.save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_over_the_file_a_live_model_maps(lm, saved):
    live = GPT2LMHeadModel.from_pretrained(saved)
    expected = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.zero_()
    lm.save_pretrained(saved)
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    live.save_pretrained(saved)
    assert_same(GPT2LMHeadModel.from_pretrained(saved), live)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_training_a_mapped_model_does_not_reach_the_file(lm, saved, save_pickle, file):
    folder = saved if file == "model.safetensors" else save_pickle(lm.state_dict())
    before = (folder / file).read_bytes()
    model = GPT2LMHeadModel.from_pretrained(folder).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 61, (2, 9))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(model.get_parameter(name), lm.get_parameter(name))
    assert (folder / file).read_bytes() == before


def test_saving_over_the_pytorch_file_it_came_from(lm, save_pickle):
    """`torch.save` truncates the file first: a model that mapped it would die of that."""
    path = save_pickle(lm.state_dict()) / "pytorch_model.bin"
    model = GPT2LMHeadModel.from_pretrained(path.parent)
    path.write_bytes(b"")
    assert_same(model, lm)
    torch.save(model.state_dict(), path)
    assert_same(GPT2LMHeadModel.from_pretrained(path.parent), lm)


def test_order_of_formats(lm, config, tmp_path):
    """Each format holds another model; the first one present is read."""

    def changed(value):
        state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
        state["transformer.ln_f.bias"].fill_(value)
        del state["lm_head.weight"]
        return state

    def loaded():
        return GPT2LMHeadModel.from_pretrained(tmp_path).transformer.ln_f.bias[0].item()

    config.to_json_file(tmp_path / "config.json")
    state = changed(4)
    torch.save(state, tmp_path / "part.bin")
    index = {"weight_map": dict.fromkeys(state, "part.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert loaded() == 4
    torch.save(changed(3), tmp_path / "pytorch_model.bin")
    assert loaded() == 3
    save_file(changed(2), tmp_path / "part.safetensors")
    index = {"weight_map": dict.fromkeys(state, "part.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert loaded() == 2
    save_file(changed(1), tmp_path / "model.safetensors")
    assert loaded() == 1


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_pickles(lm, save_pickle, zipped, wrapper):
    state = lm.state_dict()
    content = state if wrapper is None else {wrapper: state, "epoch": 3}
    folder = save_pickle(content, _use_new_zipfile_serialization=zipped)
    assert_same(GPT2LMHeadModel.from_pretrained(folder), lm)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.pth", "noextension"])
def test_single_files(lm, config, tmp_path, name):
    path = tmp_path / name
    state = dict(lm.named_parameters())
    if name == "x.safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    with pytest.raises(FileNotFoundError, match=r"found no config\.json in the folder"):
        GPT2LMHeadModel.from_pretrained(path)
    assert_same(GPT2LMHeadModel.from_pretrained(path, config=config), lm)
    config.to_json_file(tmp_path / "config.json")
    assert_same(GPT2LMHeadModel.from_pretrained(str(path)), lm)


def test_first_published_file_names(lm, config, tmp_path):
    config.to_json_file(tmp_path / "gpt2-config.json")
    torch.save(lm.state_dict(), tmp_path / "gpt2-pytorch_model.bin")
    assert_same(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2-pytorch_model.bin"), lm)


@pytest.mark.parametrize("top", ["", "./", "folder/"])
def test_archive_of_pytorch_pretrained_bert(lm, save_pickle, tmp_path, top, monkeypatch):
    folder = save_pickle(lm.state_dict())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with tarfile.open(tmp_path / "gpt2.tar.gz", "w:gz") as archive:
        for name in ("pytorch_model.bin", "config.json"):
            archive.add(folder / name, arcname=top + name)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2.tar.gz")
    assert list(scratch.iterdir()) == []
    assert_same(model, lm)


def test_archive_without_a_configuration(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    with pytest.raises(FileNotFoundError, match=r"no config\.json in the archive .*a\.tar\.gz"):
        GPT2Model.from_pretrained(tmp_path / "a.tar.gz")


def test_subfolder(lm, saved, tmp_path):
    shutil.move(saved, tmp_path / "repo" / "inner")
    assert_same(GPT2LMHeadModel.from_pretrained(tmp_path / "repo", subfolder="inner"), lm)


def test_missing_files_name_what_and_where(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder or file /no/such/place"):
        GPT2Model.from_pretrained("/no/such/place")
    with pytest.raises(FileNotFoundError, match=rf"no folder or file {tmp_path}/absent"):
        GPT2Model.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=rf"found no config\.json in the folder {tmp_path}"):
        GPT2Model.from_pretrained(tmp_path)
    config.to_json_file(tmp_path / "config.json")
    expected = r"found no model\.safetensors or .* or pytorch_model\.bin or .* in the folder"
    with pytest.raises(FileNotFoundError, match=expected):
        GPT2Model.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    with pytest.raises(FileNotFoundError, match="names the shard b, which is not beside it"):
        GPT2Model.from_pretrained(tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_the_checkpoints_unless_asked_for(lm, tmp_path, stored):
    lm.to(stored).save_pretrained(tmp_path)
    assert GPT2LMHeadModel.from_pretrained(tmp_path).dtype == stored
    assert GPT2LMHeadModel.from_pretrained(tmp_path, dtype="auto").dtype == stored
    for dtype in (torch.float32, "float32"):
        model = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert_same(model, lm.to(torch.float32))
        lm.to(stored)
    assert GPT2LMHeadModel.from_pretrained(tmp_path, torch_dtype="bfloat16").dtype == torch.bfloat16
    # The configuration goes before the tensors, as in transformers.
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert GPT2LMHeadModel.from_pretrained(tmp_path).dtype == stored
    (tmp_path / "config.json").write_text(json.dumps({**fields, "torch_dtype": "float64"}))
    assert GPT2LMHeadModel.from_pretrained(tmp_path).dtype == torch.float64


@pytest.mark.parametrize("dtype", ["int8", torch.int64, "tensor", 5])
def test_dtype_must_be_a_floating_one(saved, dtype):
    with pytest.raises(ValueError, match=f"dtype must be one of float32.*; got {dtype!r}"):
        GPT2Model.from_pretrained(saved, dtype=dtype)


def test_device(saved):
    assert GPT2LMHeadModel.from_pretrained(saved, device="cpu").device == torch.device("cpu")
    for device_map in ("cpu", {"": "cpu"}, torch.device("cpu")):
        model = GPT2LMHeadModel.from_pretrained(saved, device_map=device_map)
        assert model.device == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert GPT2LMHeadModel.from_pretrained(saved, device_map="auto").device.type == expected
    with pytest.raises(ValueError, match="device_map must name a single device"):
        GPT2LMHeadModel.from_pretrained(saved, device_map={"transformer": 0, "lm_head": "cpu"})


@pytest.mark.gpu
def test_loads_onto_the_gpu(lm, saved):
    model = GPT2LMHeadModel.from_pretrained(saved, device="cuda", dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same(model.cpu(), lm.to(torch.bfloat16))


def test_config_in_every_form(lm, config, saved, tmp_path):
    (saved / "config.json").rename(tmp_path / "elsewhere.json")
    path = tmp_path / "elsewhere.json"
    for given in (config, config.to_dict(), path, str(path)):
        assert_same(GPT2LMHeadModel.from_pretrained(saved, config=given), lm)


def test_config_of_transformers(lm, config, saved):
    given = transformers.GPT2Config(**config.to_dict())
    assert_same(GPT2LMHeadModel.from_pretrained(saved, config=given), lm)


def test_config_overrides(config, saved):
    model = GPT2LMHeadModel.from_pretrained(saved, embd_pdrop=0.5, output_hidden_states=True)
    assert model.config.embd_pdrop == 0.5
    assert len(model(torch.zeros(1, 2, dtype=torch.long)).hidden_states) == 3
    model = GPT2LMHeadModel.from_pretrained(saved, config=config, attn_pdrop=0.25)
    assert model.config.attn_pdrop == 0.25
    assert config.attn_pdrop == 0.1
    with pytest.raises(TypeError, match="'atn_pdrop' is neither an argument nor a field"):
        GPT2LMHeadModel.from_pretrained(saved, atn_pdrop=0.25)
    with pytest.raises(ValueError, match=r"attn_pdrop must be a probability.*got 2"):
        GPT2LMHeadModel.from_pretrained(saved, attn_pdrop=2)


@pytest.mark.filterwarnings("ignore:.*not used")
def test_fewer_layers_than_the_checkpoint(lm, saved):
    model, info = GPT2LMHeadModel.from_pretrained(saved, n_layer=1, output_loading_info=True)
    assert len(model.transformer.h) == 1
    assert {name.split(".")[2] for name in info["unexpected_keys"]} == {"1"}


def test_keywords_of_transformers_without_effect_here(lm, saved):
    model = GPT2LMHeadModel.from_pretrained(
        saved,
        low_cpu_mem_usage=True,
        attn_implementation="eager",
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=False,
        quantization_config=None,
    )
    assert_same(model, lm)
    assert not hasattr(model.config, "low_cpu_mem_usage")
    with pytest.raises(TypeError, match=r"^'ignore_mismatched_sizes' is neither an argument nor"):
        GPT2LMHeadModel.from_pretrained(saved, ignore_mismatched_sizes=True)


def test_state_dict_given(lm, config, saved):
    state = {name: tensor + 1 for name, tensor in lm.state_dict().items()}
    for model in (
        GPT2LMHeadModel.from_pretrained(saved, state_dict=state),
        GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=state),
    ):
        assert torch.equal(model.transformer.ln_f.bias, state["transformer.ln_f.bias"])
        with torch.no_grad():
            model.transformer.ln_f.bias.zero_()
        assert state["transformer.ln_f.bias"].abs().sum() > 0
    with pytest.raises(ValueError, match="both config and state_dict must be given"):
        GPT2LMHeadModel.from_pretrained(None, config=config)


def test_loading_info_and_silence_where_all_fits(saved, recwarn):
    model, info = GPT2LMHeadModel.from_pretrained(saved, output_loading_info=True)
    assert isinstance(model, GPT2LMHeadModel)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    assert [str(w.message) for w in recwarn if "newly" in str(w.message)] == []


@pytest.mark.filterwarnings("ignore:.*newly initialised")
def test_nothing_stays_on_the_meta_device(saved):
    for cls in OURS.values():
        model = cls.from_pretrained(saved)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert {p.requires_grad for p in model.parameters()} == {True}
        assert {p.is_contiguous() for p in model.parameters()} == {True}
        assert list(model.buffers()) == []


def test_max_shard_size_must_be_a_size(lm, tmp_path):
    for size in ("5 apples", "0", "-1", "1.5GB"):
        with pytest.raises(ValueError, match="max_shard_size must be"):
            lm.save_pretrained(tmp_path, max_shard_size=size)


@pytest.mark.parametrize("cls", OURS.values())
def test_wrong_sizes_name_the_tensor_and_both_shapes(cls, saved):
    expected = r"wte\.weight is \[61, 16\], expected \[60, 16\]"
    with pytest.raises(CheckpointError, match=expected):
        cls.from_pretrained(saved, vocab_size=60)


def test_properties(lm, config):
    sizes = [parameter.numel() for parameter in lm.parameters()]
    assert lm.num_parameters() == sum(sizes)
    assert lm.num_parameters(exclude_embeddings=True) == sum(sizes) - (61 + 16) * 16
    lm.transformer.wte.requires_grad_(False)
    assert lm.num_parameters(only_trainable=True) == sum(sizes) - 61 * 16
    assert lm.dtype == torch.float32
    assert lm.config == config


def test_gradient_checkpointing_switch(lm):
    assert not lm.is_gradient_checkpointing
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    assert lm.is_gradient_checkpointing
    assert lm.transformer.is_gradient_checkpointing
    lm.gradient_checkpointing_disable()
    assert not lm.transformer.is_gradient_checkpointing
    with pytest.raises(ValueError, match="use_reentrant=False"):
        lm.gradient_checkpointing_enable({"use_reentrant": True})
