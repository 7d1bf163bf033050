"""Loading 124M parameters costs hardly more memory than the parameters, and no slow import."""

import json
import subprocess
import sys

import pytest
import torch

from gpt2fast import GPT2Config, GPT2LMHeadModel

PARAMETERS = 124_439_808

# Memory that is anonymous or mapped from the file, at its peak, beyond what the imports took.
MEASURE = """
import json, re, sys
from gpt2fast import GPT2DoubleHeadsModel, GPT2LMHeadModel, legacy

def status(field):
    with open("/proc/self/status") as file:
        return int(re.search(rf"{field}:\\s+(\\d+) kB", file.read())[1]) * 1024

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # reset the peak
before = status("VmRSS")
model = GPT2LMHeadModel.from_pretrained(sys.argv[1])
loaded = status("VmHWM") - before
# Read every weight, as a forward pass does.
for parameter in model.parameters():
    parameter.sum()
used = status("VmHWM") - before
for cls in (GPT2DoubleHeadsModel, legacy.GPT2DoubleHeadsModel):
    cls.from_pretrained(sys.argv[2])
print(json.dumps({"loaded": loaded, "used": used, "parameters": model.num_parameters(),
                  "modules": list(sys.modules)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_peak_memory_and_imports(tmp_path, saved, file):
    config = GPT2Config()
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    if file == "model.safetensors":
        model.save_pretrained(tmp_path / "full")
    else:
        (tmp_path / "full").mkdir()
        config.to_json_file(tmp_path / "full" / "config.json")
        torch.save(model.state_dict(), tmp_path / "full" / file)
    del model
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "full"), str(saved)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    measured = json.loads(run.stdout)
    assert measured["parameters"] == PARAMETERS
    if file == "model.safetensors":
        # Mapped: not even the embedding, a third of the file, is read before its first use.
        assert measured["loaded"] < 0.2 * 4 * PARAMETERS
    assert measured["used"] < 1.2 * 4 * PARAMETERS
    # Each of these would cost more time than the loading itself.
    assert not {"huggingface_hub", "sympy", "torch._dynamo", "transformers"} & {
        *measured["modules"]
    }
    for path in (tmp_path / "full").iterdir():
        path.unlink()
