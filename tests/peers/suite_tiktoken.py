"""tiktoken's tests, on our GPT2Tokenizer behind the names of tiktoken's interface."""

import sys

import pytest

from tests.peers import tiktoken_names
from tests.peers.carried import import_carried
from tests.peers.sources import TIKTOKEN

with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "tiktoken", tiktoken_names)
    _helpers = import_carried(TIKTOKEN, "test_helpers", {})
    # The tests of offsets ask for cl100k_base alone.
    _helpers.SOME_ENCODING_FACTORIES.append(_helpers.ENCODING_FACTORIES[0])
    _modules = [
        import_carried(TIKTOKEN, f"test_{name}", {})
        for name in ("encoding", "misc", "offsets", "pickle", "simple_public")
    ]

for _module in _modules:
    _short = _module.__name__.rpartition(".test_")[2]
    for _name, _test in vars(_module).items():
        # One asks what importing tiktoken loads. Two modules have tests of the same name.
        if _name.startswith("test_") and _name != "test_optional_blobfile_dependency":
            globals()[f"test_{_short}_{_name.removeprefix('test_')}"] = _test


def test_encoding_special_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # It asks for nothing of cl100k_base but its special tokens.
    monkeypatch.setattr(tiktoken_names, "OTHERS_TOKENS", ("<|fim_prefix|>", "<|fim_middle|>"))
    _modules[0].test_special_token()
