"""The tokenizer stands alone."""

import subprocess
import sys


def _modules(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_import_loads_little() -> None:
    loaded = _modules("import gpt2fast.tokenizer") - _modules("")
    heavy = {"torch", "numpy", "regex", "transformers", "huggingface_hub", "subprocess", "logging"}
    assert not heavy & loaded
    rooms = {name.split(".")[1] for name in loaded if name.startswith("gpt2fast.")}
    assert rooms == {"tokenizer", "version"}


def test_encoding_needs_neither_torch_nor_numpy() -> None:
    code = (
        "from gpt2fast.tokenizer import GPT2Tokenizer as T; t = T(); t.decode(t('é x').input_ids)"
    )
    assert not {"torch", "numpy"} & _modules(code)
