"""Decoding on a CPU costs the weights and the cache: no packed copy, no matrix of logits kept."""

import json
import subprocess
import sys

import pytest
import torch

from gpt2fast import GPT2Config, GPT2LMHeadModel

SIZES = {"vocab_size": 20_000, "n_positions": 1024, "n_embd": 768, "n_head": 12}
# Bytes of a weight, and so many layers that a matrix and a step's rows are small beside the whole.
FORMS = {torch.float32: (4, 6), torch.bfloat16: (2, 12)}

# Memory that is anonymous or mapped from the file, at its peak, beyond what the imports took.
MEASURE = """
import json, re, sys
import torch
from gpt2fast import GPT2LMHeadModel
from gpt2fast.engine.torch_runner import TorchRunner
from gpt2fast.kernels.decode_state import RUNNING

torch.set_num_threads(1)

def status(field):
    with open("/proc/self/status") as file:
        return int(re.search(rf"{field}:\\s+(\\d+) kB", file.read())[1]) * 1024

def generate(model, length, new_tokens):
    runner = TorchRunner(model, 1, model.config.n_positions)
    state = runner.state
    state.tokens[0, :length] = torch.randint(100, (length,))
    state.limits[0], state.status[0] = length + new_tokens, RUNNING
    runner.prefill(0, 0, length)
    runner.advance([0], new_tokens)
    assert int(state.lengths[0]) == length + new_tokens - 1
    return sum(t.numel() * t.element_size() for t in runner._cache)

with torch.no_grad():
    # The libraries' own buffers do not grow with the model.
    generate(GPT2LMHeadModel.from_pretrained(sys.argv[2]), 100, 2)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    before = status("VmRSS")
    model = GPT2LMHeadModel.from_pretrained(sys.argv[1])
    cache = generate(model, 600, 3)
    used = status("VmHWM") - before
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"used": used, "weights": weights, "cache": cache}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("dtype", FORMS, ids=str)
def test_peak(tmp_path, dtype):
    size, layers = FORMS[dtype]
    full = {**SIZES, "n_layer": layers}
    for name, sizes in (("full", full), ("small", {**full, "n_embd": 48, "n_layer": 1})):
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config(**sizes))
        model.to_empty(device="cpu").tie_weights()
        model.to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
        model.save_pretrained(tmp_path / name)
    del model
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "full"), str(tmp_path / "small")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    measured = json.loads(run.stdout)
    parameters = 20_000 * 768 + 1024 * 768 + layers * 12 * 768**2
    assert measured["weights"] == pytest.approx(size * parameters, rel=0.01)
    assert measured["cache"] <= 2 * layers * 1024 * 768 * 4
    assert measured["used"] < 1.15 * (measured["weights"] + measured["cache"])
    (tmp_path / "full" / "model.safetensors").unlink()
