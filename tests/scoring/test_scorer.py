"""score and Scorer against a naive loop over windows and logits, and what they do with the rest."""

import itertools
import math
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpt2fast
from gpt2fast import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, Score, Scorer, score
from gpt2fast.scoring import scorer as scoring
from tests.models.reference import CONTEXT, VOCAB, pair
from tests.scoring.conftest import naive
from tests.tolerances import BUDGET, FLOAT32

TEXTS = ["The captain of the ship", "", "A", "It was a dark night, and the old house stood empty."]


def errors(
    found: list[list[float | None]], expected: list[list[float | None]]
) -> tuple[float, float]:
    """The largest difference, and the largest value; None must stand at the same places."""
    worst = largest = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        assert [value is None for value in ours] == [value is None for value in theirs]
        for a, b in zip(ours, theirs, strict=True):
            if a is not None and b is not None:
                worst, largest = max(worst, abs(a - b)), max(largest, abs(b))
    return worst, largest


def texts_of(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    lengths = [rng.choice([rng.randrange(4), rng.randrange(longest)]) for _ in range(count)]
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def test_fuzzed_against_a_naive_loop() -> None:
    """Any lengths, windows, batches, with and without a first token, in one go or as a stream."""
    ours, theirs = pair()
    rng = random.Random(0)
    for _ in range(8):
        texts = texts_of(rng, rng.randrange(1, 7), rng.choice([30, 80]))
        max_length = rng.choice([CONTEXT, rng.randint(2, CONTEXT)])
        stride = rng.choice([max_length, rng.randint(-(-max_length // 2), max_length)])
        options = {"max_length": max_length, "stride": stride, "add_bos": rng.random() < 0.5}
        scorer = Scorer(ours, batch_tokens=rng.choice([1, 50, 1000]), **options)
        scores = scorer(texts) if rng.random() < 0.5 else [*scorer.stream(iter(texts))]
        assert [found.token_ids for found in scores] == texts
        bos = 0 if options["add_bos"] else None
        expected = [naive(theirs, ids, max_length, stride, bos) for ids in texts]
        worst, largest = errors([found.log_probs for found in scores], expected)
        assert worst <= FLOAT32["model", "forward"] * max(largest, 1), options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_as_exact_as_plain_pytorch(dtype: torch.dtype) -> None:
    ours, theirs = pair()
    texts = texts_of(random.Random(1), 6, 60)
    exact = [naive(theirs, ids, CONTEXT, 20) for ids in texts]
    plain = [naive(theirs.to(dtype), ids, CONTEXT, 20) for ids in texts]
    found = [s.log_probs for s in Scorer(ours.to(dtype), stride=20, batch_tokens=100)(texts)]
    budget, largest = errors(plain, exact)
    assert errors(found, exact)[0] <= BUDGET * budget + torch.finfo(dtype).eps / 2 * largest


@pytest.mark.parametrize("mode", ["int8", "fp16", "int4"])
def test_low_bits(mode: str, tiny: Path) -> None:
    """As the quantised model's own logits say; int8's activations may round to a neighbour."""
    model = GPT2LMHeadModel.from_pretrained(tiny, quantize=mode)
    tokenizer = GPT2Tokenizer()
    found = score(TEXTS * 2, model=tiny, quantize=mode, stride=8, batch_tokens=40)
    expected = [naive(model, tokenizer.encode(text), 32, 8) for text in TEXTS * 2]
    worst, largest = errors([s.log_probs for s in found], expected)
    assert worst <= (0.02 if mode == "int8" else 1e-5) * largest
    floats = [s.log_probs for s in score(TEXTS * 2, model=tiny, stride=8)]
    assert errors([s.log_probs for s in found], floats)[0] > 0  # it is another model


def test_a_model_of_transformers_is_used_where_it_lies() -> None:
    ours, theirs = pair()
    theirs = theirs.float()
    texts = texts_of(random.Random(2), 5, 60)
    scorer = Scorer(theirs)
    inner = scorer._model._model
    assert isinstance(inner, GPT2LMHeadModel)
    places = {p.data_ptr() for p in theirs.parameters()}
    assert {p.data_ptr() for p in inner.parameters()} == places
    assert scorer(texts) == Scorer(ours)(texts)
    with torch.no_grad():
        theirs.transformer.h[0].mlp.c_fc.bias.add_(0.5)
    assert scorer(texts) != Scorer(ours)(texts)  # the memory is shared, so training is seen
    assert all(p.requires_grad for p in theirs.parameters())


def hooked(model: Any) -> None:
    model.transformer.h[1].mlp.register_forward_hook(lambda m, args, out: out + 0.5)


def biased(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB, dtype=model.dtype))


def wrapped(model: Any) -> None:
    model.lm_head = nn.Sequential(model.lm_head, nn.Softplus())


def hooked_whole(model: Any) -> None:
    def double(module: Any, args: Any, out: Any) -> Any:
        out.logits = out.logits * 2
        return out

    model.register_forward_hook(double)


def subclassed(model: Any) -> None:
    class Doubled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            out = super().forward(*args, **options)
            out.logits = out.logits * 2
            return out

    model.__class__ = Doubled


@pytest.mark.parametrize("change", [hooked, biased, wrapped, hooked_whole, subclassed])
@pytest.mark.parametrize("source", ["ours", "transformers"])
def test_changed_models_run_as_they_are(source: str, change: Callable[[Any], None]) -> None:
    ours, theirs = pair()
    model = ours if source == "ours" else theirs.float()
    texts = texts_of(random.Random(3), 4, 60)
    before = Scorer(model)(texts)
    change(model)
    found = Scorer(model, stride=15, batch_tokens=90)(texts)
    assert found != before
    expected = [naive(model, ids, CONTEXT, 15) for ids in texts]
    worst, largest = errors([s.log_probs for s in found], expected)
    assert worst <= FLOAT32["model", "forward"] * largest


def test_offloaded_weights() -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloads weights")
    ours, theirs = pair()
    texts = texts_of(random.Random(5), 4, 60)
    expected = [s.log_probs for s in Scorer(ours)(texts)]
    accelerate.cpu_offload(theirs.float(), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in theirs.parameters())
    worst, largest = errors([s.log_probs for s in Scorer(theirs)(texts)], expected)
    assert worst <= FLOAT32["model", "forward"] * largest


def test_on_the_kernels() -> None:
    pytest.importorskip("triton")
    ours, theirs = pair(n_embd=32, n_layer=1, n_head=2)
    texts = [[1, 2, 3], [5] * 20]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = Scorer(ours.to(device))
    with gpt2fast.backend("triton"):
        found = scorer(texts)
    worst, largest = errors([s.log_probs for s in found], [naive(theirs, t, 40, 20) for t in texts])
    assert worst <= FLOAT32["model", "forward"] * largest


def test_sums_and_perplexity(tiny: Path) -> None:
    first, empty, single, last = score(TEXTS, model=tiny)
    tokenizer = GPT2Tokenizer()
    assert [s.text for s in (first, empty, single, last)] == TEXTS
    assert first.token_ids == tokenizer.encode(TEXTS[0])
    known = [value for value in first.log_probs if value is not None]
    assert first.log_probs == [None, *known]
    assert first.n_scored == len(known) == len(first.token_ids) - 1
    assert first.log_prob == pytest.approx(sum(known), rel=1e-12)
    assert first.perplexity == pytest.approx(math.exp(-sum(known) / len(known)), rel=1e-12)
    for nothing, ids in ((empty, []), (single, [32])):
        assert (nothing.token_ids, nothing.n_scored, nothing.log_prob) == (ids, 0, 0.0)
        assert nothing.log_probs == [None] * len(ids)
        assert math.isnan(nothing.perplexity)
    with_bos = score(TEXTS, model=tiny, add_bos=True)
    assert [s.n_scored for s in with_bos] == [len(s.token_ids) for s in with_bos]
    assert Score([1], [-1e6]).perplexity == math.inf


def test_one_text_ids_tensors_and_no_text_at_all(tiny: Path) -> None:
    scorer = Scorer(tiny)
    ids = [464, 10654, 286]
    (expected,) = scorer([ids])
    assert scorer(torch.tensor([ids])) == scorer([torch.tensor(ids)]) == [expected]
    assert scorer([tuple(ids)]) == [expected]
    (text,) = scorer("The captain of")
    assert (text.token_ids, text.log_probs) == (ids, expected.log_probs)
    assert scorer([]) == [*scorer.stream([])] == []
    assert expected.text is None


def test_a_stream_may_be_endless_and_keeps_its_order() -> None:
    scorer = Scorer(pair()[0], batch_tokens=16)
    endless = ([i % 50, 1, 2] * (i % 7) for i in itertools.count())
    found = [*itertools.islice(scorer.stream(endless), 300)]
    assert [s.token_ids for s in found] == [[i % 50, 1, 2] * (i % 7) for i in range(300)]
    nothing: itertools.repeat[list[int]] = itertools.repeat([])
    assert [s.n_scored for s in itertools.islice(scorer.stream(nothing), 2000)] == [0] * 2000


def test_groups_begin_anew_and_progress_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a resumed run relies on: from an end of a group on, the same numbers to the last bit."""
    monkeypatch.setattr(scoring, "_LOOK_AHEAD", 10)
    scorer = Scorer(pair()[0], batch_tokens=50, add_bos=True)
    rng = random.Random(4)
    texts = [("name", [rng.randrange(VOCAB) for _ in range(rng.randrange(90))]) for _ in range(50)]
    calls: list[tuple[float, int]] = []
    groups = [*scorer.groups(texts, lambda *args: calls.append(args))]
    assert len(groups) > 2
    whole = list(itertools.chain(*groups))
    for cut in (len(groups[0]), len(whole) - len(groups[-1])):
        again = itertools.chain.from_iterable(scorer.groups(texts[cut:]))
        assert [*again] == whole[cut:]
    assert sum(texts for texts, _ in calls) == pytest.approx(len(texts))
    assert sum(tokens for _, tokens in calls) == sum(s.n_scored for s in whole)


def test_a_bar_on_standard_error(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score(TEXTS, model=tiny, progress=True)
    assert re.search(r"100%.* 4/4 texts .*tokens/s\]", capsys.readouterr().err)
    score(TEXTS, model=tiny)
    assert capsys.readouterr().err == ""


def test_nan_stays_nan_and_in_its_text(tiny: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(tiny)
    with torch.no_grad():
        model.transformer.wte.weight[7] = math.nan  # and so every logit of token 7
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    good, bad = Scorer(model)([[1, 2, 3], [1, 7, 3, 4]])
    assert all(math.isfinite(value) for value in good.log_probs[1:])  # type: ignore[arg-type]
    assert all(math.isnan(value) for value in bad.log_probs[2:])  # type: ignore[arg-type]
    assert math.isnan(bad.perplexity)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_logits_are_never_held() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1, n_positions=512)).eval()
    scorer = Scorer(model, batch_tokens=4096)
    texts = [[i] * 512 for i in range(8)]
    scorer(texts[:1])

    def status(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status("VmRSS")
    scorer(texts)
    logits = 8 * 511 * 50257 * 4
    assert status("VmHWM") - before < 0.4 * logits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([3, 97], "text 1: token ids must be integers in [0, 97); got 97 at position 1"),
        ([-1], "text 1: token ids must be integers in [0, 97); got -1 at position 0"),
        ([True], "text 1: token ids must be integers in [0, 97); got True at position 0"),
        ([1, 2.0], "text 1: token ids must be integers in [0, 97); got 2.0 at position 1"),
        ([1, math.nan], "text 1: token ids must be integers in [0, 97); got nan at position 1"),
        ([[1]], "text 1: token ids must be integers in [0, 97); got [1] at position 0"),
        ("A cat", "text 1: token ids must be integers in [0, 97); got 3797 at position 1"),
        (3, "text 1: expected a string or a list of token ids; got int (a single text of ids is "),
        (b"A", "text 1: expected a string or a list of token ids; got bytes"),
        (None, "text 1: expected a string or a list of token ids; got NoneType"),
    ],
    ids=str,
)
def test_bad_texts(text: Any, message: str) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=1)).eval()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Scorer(model)([[1], text])


def test_bad_settings(tiny: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(tiny)
    for options, message in (
        ({"max_length": 33}, "max_length must be from 2 to 32; got 33"),
        ({"max_length": 1}, "max_length must be from 2 to 32; got 1"),
        ({"stride": 0}, "stride must be from 1 to 32; got 0"),
        ({"max_length": 8, "stride": 9}, "stride must be from 1 to 8; got 9"),
        ({"stride": 2.0}, "stride must be from 1 to 32; got 2.0"),
        ({"batch_tokens": 0}, "batch_tokens must be from 1 to 2147483647; got 0"),
        ({"dtype": "float16", "device": "cpu"}, "dtype='float16', device='cpu': only for a model "),
        ({"quantize": "int8"}, "quantize='int8': only for a model that is given by its name"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            Scorer(model, **options)  # type: ignore[arg-type]
    model.config.bos_token_id = None
    with pytest.raises(
        ValueError, match=r"^add_bos needs a bos_token_id in \[0, 50257\) in .*None"
    ):
        Scorer(model, add_bos=True)
    scorer = Scorer(model)
    model.train()
    for call in (lambda: Scorer(model), lambda: scorer("A cat sat")):
        with pytest.raises(ValueError, match=r"^the model is in training mode, with dropout"):
            call()
    with pytest.raises(TypeError, match=r"^expected the name of a model or a GPT2LMHeadModel; got"):
        Scorer(nn.Linear(2, 2))
    foreign = GPT2LMHeadModel.from_pretrained(tiny)
    foreign.config = type("Config", (), {"vocab_size": 97})()  # as of GPT-Neo
    with pytest.raises(TypeError, match=r"^expected the name of a model or a GPT2LMHeadModel; got"):
        Scorer(foreign)
    prompted: Any = model.eval()
    prompted.active_peft_config = type("Config", (), {"is_prompt_learning": True})()
    with pytest.raises(ValueError, match=r"^an adapter that learns a prompt"):
        Scorer(prompted)
