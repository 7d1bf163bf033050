"""The checkpoint inside the package: its size, its form, and that it has learned English prose."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

import gpt2fast
from gpt2fast import GPT2LMHeadModel, GPT2Tokenizer

FOLDER = Path(gpt2fast.__file__).parent / "bundled"

# Written for this test, in the manner of the books that the model was trained on.
PARAGRAPH = (
    "It was late in the evening when the carriage drew up before the door of the old house, and "
    "Miss Harcourt, who had not spoken a word since they left the village, gave her hand to the "
    "young man and stepped down upon the gravel. There was a light in the window of the library. "
    '"My father is not yet in bed," she said, in a low voice. "You will come in and speak to him, '
    'I hope?" He looked at her for a moment without making any answer. The rain had begun to fall '
    "again, and the wind was moving in the branches of the great trees on the other side of the "
    'garden. "I think," he replied at last, "that it would be better for all of us if I went away '
    "to-night, and did not come back until he has had time to forget what I told him this "
    'morning." She turned from him, and went slowly up the steps, and he heard the door close '
    "behind her."
)
# Nats a token, measured on the released file, and a margin for other machines' rounding.
RECORDED_LOSS = 3.2056


@pytest.fixture(scope="module")
def model():
    return GPT2LMHeadModel.from_pretrained("bundled")


@pytest.fixture(scope="module")
def ids():
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    return torch.tensor([[50256, *tokenizer.encode(PARAGRAPH)]])


def test_its_size_and_shape(model):
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    header_length = int.from_bytes(weights.read_bytes()[:8], "little")
    header = json.loads(weights.read_bytes()[8 : 8 + header_length])
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"F16"}
    assert "lm_head.weight" not in header  # tied: saved once
    assert (model.config.vocab_size, model.config.n_positions) == (50257, 1024)
    assert (FOLDER / "README.md").is_file()


def test_it_predicts_prose_far_better_than_word_counts(model, ids):
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss == pytest.approx(RECORDED_LOSS, abs=0.01)
    summary = json.loads((FOLDER / "summary.json").read_text())
    assert loss < summary["validation_loss_unigram"] - 1.5
    assert summary["validation_loss_rows_of_1024"] < 5.0
    assert summary["validation_loss_rows_of_1024"] < summary["validation_loss_bigram"]


def test_it_reads_the_whole_context(model, ids):
    """Tokens late in a window of 1,024 are predicted no worse than early ones."""
    long = ids[:, 1:].repeat(1, 6)[:, :1024]
    with torch.no_grad():
        logits = model(long).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], long[0, 1:], reduction="none")
    length = ids.size(1) - 1
    assert math.isfinite(losses.sum().item())
    assert losses[-length:].mean() < losses[:length].mean() + 0.1


def test_transformers_reads_the_same_model(model, ids):
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(os.fspath(FOLDER), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-4)
