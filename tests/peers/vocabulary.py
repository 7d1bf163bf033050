"""GPT-2's vocabulary in files, where the tests of tokenizers look for files."""

import contextlib
import tempfile
from pathlib import Path

from gpt2fast.tokenizer import GPT2Tokenizer
from tests.peers.sources import CACHE, TRANSFORMERS, fetch

FOLDER = CACHE / "vocabulary"


def write_vocabulary() -> Path:
    """A folder with GPT-2's tokenizer, with a token for padding; written once a run."""
    # The tests open a text, which is not carried, and do not use it.
    text = fetch(TRANSFORMERS) / "tests" / "fixtures" / "sample_text.txt"
    text.parent.mkdir(exist_ok=True)
    text.touch()
    if not FOLDER.is_dir():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            GPT2Tokenizer(pad_token="<|endoftext|>").save_pretrained(f"{scratch}/vocabulary")
            # Of processes that begin together each writes one, and the first is kept.
            with contextlib.suppress(OSError):
                Path(scratch, "vocabulary").rename(FOLDER)
    return FOLDER
