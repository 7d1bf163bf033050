"""Checkpoints of quantised models: written, mapped, made while loading, and refused when wrong."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2fast import GPT2Config, GPT2LMHeadModel, GPT2Model, quantize
from gpt2fast.checkpoint import CheckpointError
from gpt2fast.checkpoint.weights import read_tensors
from gpt2fast.cli import main
from gpt2fast.engine.weights import why_not
from gpt2fast.quantization import stored_tensors

IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 110]])
WEIGHT = "transformer.h.0.attn.c_attn.weight"
SCALE = "transformer.h.0.attn.c_attn.scale"


def _logits(model: GPT2LMHeadModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def _change(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()  # which is mapped
    save_file(tensors, folder / "model.safetensors")


def _configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_round_trip(floats: GPT2LMHeadModel, mode: str, tmp_path: Path) -> None:
    model = quantize(floats, mode)
    expected = _logits(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.quantization_config["mode"] == mode
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    assert torch.equal(_logits(loaded), expected)
    assert {t.device.type for t in (*loaded.buffers(), *loaded.parameters())} == {"cpu"}
    assert why_not(loaded) is None  # the engine serves it
    held = stored_tensors(model)
    assert {name: (t.shape, t.dtype) for name, t in stored_tensors(loaded).items()} == {
        name: (t.shape, t.dtype) for name, t in held.items()
    }
    assert "lm_head.weight" not in held
    body = GPT2Model.from_pretrained(tmp_path)
    assert torch.equal(body.wte.weight, loaded.transformer.wte.weight)
    half = GPT2LMHeadModel.from_pretrained(tmp_path, dtype="bfloat16")
    assert half.transformer.h[0].attn.c_attn.weight.dtype == loaded.lm_head.weight.dtype or (
        mode == "int4"
    )
    assert half.dtype == _logits(half).dtype == torch.bfloat16


def test_an_untied_head_is_stored(floats: GPT2LMHeadModel, mode: str, tmp_path: Path) -> None:
    config = GPT2Config.from_dict({**floats.config.to_dict(), "tie_word_embeddings": False})
    model = quantize(GPT2LMHeadModel(config), mode)
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)
    assert torch.equal(_logits(loaded), _logits(model))


@pytest.mark.filterwarnings("error:GPT2LMHeadModel")
@pytest.mark.parametrize("pickled", [False, True])
def test_quantised_while_loading(
    floats: GPT2LMHeadModel, mode: str, pickled: bool, tmp_path: Path
) -> None:
    floats.save_pretrained(tmp_path)
    if pickled:
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, quantize=mode)
    assert torch.equal(_logits(loaded), _logits(quantize(floats, mode)))
    given = GPT2LMHeadModel.from_pretrained(
        None, config=loaded.config, state_dict=loaded.state_dict()
    )
    assert torch.equal(_logits(given), _logits(loaded))


@pytest.mark.parametrize("assign", [False, True])
def test_the_tensors_of_a_file_are_a_state_dict(saved: Path, assign: bool) -> None:
    model = GPT2LMHeadModel.from_pretrained(saved)
    expected = _logits(model)
    tensors = load_file(saved / "model.safetensors")
    model.transformer.wte.weight.zero_()
    assert not torch.equal(_logits(model), expected)
    model.load_state_dict(tensors, assign=assign)
    assert torch.equal(_logits(model), expected)
    assert model.lm_head.weight is model.transformer.wte.weight
    head = tensors["transformer.wte.weight"]
    model.load_state_dict({**tensors, "lm_head.weight": head.clone()})
    with pytest.raises(CheckpointError, match="differ in the checkpoint"):
        model.load_state_dict({**tensors, "lm_head.weight": torch.zeros_like(head)})


def test_low_bits_are_mapped_wherever_they_lie(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = [1, 3, 4095, 4097, 70_001, 5, 12_345]  # of a file of some thirty pages
    tensors = {
        f"t{i}": torch.randint(-128, 128, (n,), dtype=torch.int8) for i, n in enumerate(sizes)
    }
    tensors |= {
        "bytes": torch.randint(0, 256, (31, 77), dtype=torch.uint8),
        "halves": torch.randn(99, 101).half(),
        "empty": torch.empty(0, 3, dtype=torch.int8),
        "float": torch.randn(3, 5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_tensors(tmp_path / "model.safetensors", lambda name: None)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        found[name].fill_(7)  # of private pages
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name])


MEMORY = """
import re, sys
from pathlib import Path
import gpt2fast.checkpoint
from gpt2fast import GPT2LMHeadModel

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

start = anonymous()
made = GPT2LMHeadModel.from_pretrained(sys.argv[1], quantize="int8")
middle = anonymous()
mapped = GPT2LMHeadModel.from_pretrained(sys.argv[2])
print(middle - start, anonymous() - middle)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_no_second_copy(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=1000, n_positions=16, n_embd=512, n_layer=4, n_head=2)
    model = GPT2LMHeadModel(config)
    kilobytes = sum(p.numel() for p in model.parameters()) // 1024  # of int8
    model.save_pretrained(tmp_path / "float32")
    quantize(model, "int8").save_pretrained(tmp_path / "int8")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "float32"), str(tmp_path / "int8")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    made, mapped = map(int, done.stdout.split())
    # The floats are mapped; what is taken is int8, and what a few matrices passed through. A copy
    # of the floats would be 4 by itself.
    assert 0.9 * kilobytes < made < 4 * kilobytes
    assert mapped < 0.3 * kilobytes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "gpt2fast", "mode": "int3"}}, "got 'int3'"),
        ({"quantization_config": {"quant_method": "gpt2fast"}}, "got None"),
        ({"quantization_config": {"quant_method": "gpt2fast", "mode": ["int8"]}}, r"\['int8'\]"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "got 'bitsandbytes'"),
        ({"quantization_config": "int8"}, "got 'int8'"),
        ({"quantization_config": None}, "is torch.int8, expected one of float32"),
    ],
    ids=str,
)
def test_hostile_configurations(
    floats: GPT2LMHeadModel, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    quantize(floats, "int8").save_pretrained(tmp_path)
    _configure(tmp_path, **fields)
    if fields["quantization_config"] is None:
        # As float weights they do not even have the shape.
        message = r"the checkpoint does not fit the configuration"
    with pytest.raises(CheckpointError, match=message):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def _set(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(WEIGHT, torch.zeros(96, 32)), "float32, expected torch.int8"),
        (_set(WEIGHT, torch.zeros(96, 32, dtype=torch.uint8)), "uint8, expected torch.int8"),
        (_set(WEIGHT, torch.zeros(32, 96, dtype=torch.int8)), r"\[32, 96\], expected \[96, 32\]"),
        (_set(SCALE, torch.ones(96, dtype=torch.float64)), "float64, expected torch.float32"),
        (_set(SCALE, torch.ones(97)), r"\[97\], expected \[96\]"),
        (_set(SCALE, torch.full((96,), float("nan"))), "positive and finite; it holds nan"),
        (_set(SCALE, torch.full((96,), float("inf"))), "positive and finite; it holds inf"),
        (_set(SCALE, torch.full((96,), -0.5)), "positive and finite; it holds -0.5"),
        (lambda tensors: tensors.pop(SCALE), f"lacks {SCALE} of a quantised model"),
        (lambda tensors: tensors.pop(WEIGHT), f"lacks {WEIGHT} of a quantised model"),
        (_set("transformer.h.0.ln_1.weight", torch.zeros(32, dtype=torch.int8)), "expected one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a function's text is its address
)
def test_hostile_tensors(
    floats: GPT2LMHeadModel,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    quantize(floats, "int8").save_pretrained(tmp_path)
    _change(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_an_odd_width_under_int4(floats: GPT2LMHeadModel, tmp_path: Path) -> None:
    def narrow(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".mlp.c_fc." in name:
                tensors[name] = tensor[:127].contiguous()
            elif name.endswith(".mlp.c_proj.weight"):
                tensors[name] = tensor[:, :63].contiguous()

    quantize(floats, "int4").save_pretrained(tmp_path)
    _change(tmp_path, narrow)
    _configure(tmp_path, n_inner=127)
    with pytest.raises(CheckpointError, match=r"even number of inputs; .*mlp\.c_proj has 127"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_float_weights_under_a_quantised_configuration(
    floats: GPT2LMHeadModel, tmp_path: Path
) -> None:
    floats.save_pretrained(tmp_path)
    _configure(tmp_path, quantization_config={"quant_method": "gpt2fast", "mode": "fp16"})
    with pytest.raises(CheckpointError, match="does not fit the configuration"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_another_mode_than_the_checkpoint_s_is_refused(saved: Path, mode: str) -> None:
    assert GPT2LMHeadModel.from_pretrained(saved, quantize=mode).config.quantization_config
    other = "int8" if mode != "int8" else "fp16"
    with pytest.raises(ValueError, match=f"quantize='{other}'.*already, as '{mode}'"):
        GPT2LMHeadModel.from_pretrained(saved, quantize=other)
    with pytest.raises(ValueError, match="int8, fp16, int4; got 'int5'"):
        GPT2LMHeadModel.from_pretrained("bundled", quantize="int5")


def test_transformers_refuses_the_checkpoint(floats: GPT2LMHeadModel, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    quantize(floats, "int8").save_pretrained(tmp_path)
    # It warns that it knows no such method; then no projection has the shape that it expects.
    with pytest.raises((RuntimeError, ValueError)):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)


def test_the_float_checkpoint_is_as_ever(floats: GPT2LMHeadModel, tmp_path: Path) -> None:
    twin = GPT2LMHeadModel(floats.config)
    quantize(floats, "int8")
    twin.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not any(name.endswith("scale") for name in load_file(tmp_path / "model.safetensors"))


def test_a_float_model_of_a_quantised_configuration(
    floats: GPT2LMHeadModel, tmp_path: Path
) -> None:
    twin = GPT2LMHeadModel(quantize(floats, "int8").config).eval()
    twin.save_pretrained(tmp_path)
    assert torch.equal(_logits(GPT2LMHeadModel.from_pretrained(tmp_path)), _logits(twin))


def test_the_command_line_quantises(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "bundled", "--greedy", "--max-new-tokens", "4", "--json"]
    texts = {}
    for mode in (None, "fp16", "int8"):
        chosen = [] if mode is None else ["--quantize", mode]
        assert main(["generate", *options, *chosen, "The captain stood"]) == 0
        texts[mode] = json.loads(capsys.readouterr().out)["text"]
    assert texts["fp16"] == texts[None]
    assert re.search(r"\w", texts["int8"])
