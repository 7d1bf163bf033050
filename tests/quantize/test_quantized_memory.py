"""An int8 checkpoint costs one layout of its weights and what is written of the cache."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2Config, GPT2LMHeadModel, quantize

# Inputs that fill the blocks of every op's layout, so that it takes a byte a weight; and a small
# head, whose rows are kept in both forms.
SIZES = {"vocab_size": 1000, "n_positions": 1024, "n_embd": 1024, "n_head": 16}
LAYERS = 3
WEIGHTS = LAYERS * 12 * 1024**2
PROMPT, NEW = 40, 4

# Memory that is anonymous or mapped from the file, at its peak, beyond what a small model took.
MEASURE = """
import json, re, sys
import torch
from gpt2fast import GPT2LMHeadModel

torch.set_num_threads(2)

def status(field):
    with open("/proc/self/status") as file:
        return int(re.search(rf"{field}:\\s+(\\d+) kB", file.read())[1]) * 1024

def generate(model, prompt, new):
    out = model.generate(torch.ones(1, prompt, dtype=torch.long), max_new_tokens=new)
    assert out.shape == (1, prompt + new)

prompt, new = map(int, sys.argv[3:])
# The libraries' own buffers, and the choice of the op, do not grow with the model.
generate(GPT2LMHeadModel.from_pretrained(sys.argv[2]), prompt, new)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # reset the peak
before = status("VmRSS")
model = GPT2LMHeadModel.from_pretrained(sys.argv[1])
loaded = status("VmHWM") - before
generate(model, prompt, new)
print(json.dumps({"loaded": loaded, "used": status("VmHWM") - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_peak(tmp_path: Path) -> None:
    full = {**SIZES, "n_layer": LAYERS, "bos_token_id": 0, "eos_token_id": None}
    for name, sizes in (("full", full), ("small", {**full, "n_embd": 48, "n_layer": 1})):
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config(**sizes))
        model.to_empty(device="cpu").tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
        quantize(model, "int8").save_pretrained(tmp_path / name)
    del model
    folders = [str(tmp_path / "full"), str(tmp_path / "small")]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *folders, str(PROMPT), str(NEW)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    measured = json.loads(run.stdout)
    held = 1000 * 1024 * 2 + 1024 * 1024 * 4  # the head twice, and positions in float32
    written = LAYERS * 2 * (PROMPT + NEW) * 1024 * 4
    # The file is mapped, and is not read before it is needed.
    assert measured["loaded"] < 0.2 * WEIGHTS
    # Neither do pages of the file stay beside what was laid out from them, nor does the cache's
    # room for more and longer sequences, here larger than the weights, take memory before its use.
    assert measured["used"] < 1.15 * (WEIGHTS + held + written)
    (tmp_path / "full" / "model.safetensors").unlink()
