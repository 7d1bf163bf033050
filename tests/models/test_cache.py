"""KVCache as a value: no continuation ever changes the past that it was given."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import transformers
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from gpt2fast import KVCache
from gpt2fast.cache import _Storage
from tests.models.reference import CONTEXT, HEADS, LAYERS, WIDTH, assert_forward, pair, tokens

SIZE = WIDTH // HEADS


def _layers(batch: int = 2, length: int = 3) -> list[Tensor]:
    return [torch.randn(2, batch, HEADS, length, SIZE) for _ in range(LAYERS)]


def _equal(cache: KVCache, layers: list[Tensor]) -> bool:
    return len(cache) == len(layers) and all(map(torch.equal, cache, layers))


def _appended(cache: KVCache, extra: list[Tensor]) -> KVCache:
    """What a forward pass does."""
    grown = cache.extended(extra[0].shape[3])
    for buffer, new in zip(grown.buffers, extra, strict=True):
        buffer[:, :, :, cache.get_seq_length() : grown.get_seq_length()] = new
    return grown


def _cat(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    return [torch.cat(both, 3) for both in zip(first, second, strict=True)]


class TestSequence:
    def test_reads_as_the_list_of_stacked_tensors(self) -> None:
        layers = _layers(length=5)
        cache = KVCache(layers)
        assert _equal(cache, layers)
        assert len(cache) == LAYERS
        assert [t.shape for t in cache] == [(2, 2, HEADS, 5, SIZE)] * LAYERS
        assert torch.equal(cache[-1], layers[-1])
        assert all(map(torch.equal, cache[1:], layers[1:]))
        key, value = cache[0]
        assert torch.equal(key, layers[0][0])
        assert torch.equal(value, layers[0][1])
        assert (cache.get_seq_length(), cache.get_seq_length(1), cache.batch_size) == (5, 5, 2)
        assert repr(cache) == (
            f"KVCache(layers={LAYERS}, shape=[2, 2, {HEADS}, 5, {SIZE}], dtype=torch.float32)"
        )
        with pytest.raises(IndexError):
            _ = cache[LAYERS]

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ([], "a cache needs at least one layer; got none"),
            ([torch.zeros(2, 1, 4, 3)], "every layer of the past must be [2, batch, heads, time, "
             "head size], alike; layer 0 is [2, 1, 4, 3], layer 0 is [2, 1, 4, 3]"),
            ([torch.zeros(2, 1, 4, 3, 8), torch.zeros(2, 1, 4, 2, 8)], "every layer of the past "
             "must be [2, batch, heads, time, head size], alike; layer 0 is [2, 1, 4, 3, 8], "
             "layer 1 is [2, 1, 4, 2, 8]"),
            ([torch.zeros(3, 1, 4, 3, 8)], "every layer of the past must be [2, batch, heads, "
             "time, head size], alike; layer 0 is [3, 1, 4, 3, 8], layer 0 is [3, 1, 4, 3, 8]"),
        ],
    )  # fmt: skip
    def test_wrong_layers(self, layers: list[Tensor], message: str) -> None:
        for build in (KVCache, KVCache.from_past):
            with pytest.raises(ValueError) as error:  # noqa: PT011
                build(layers)
            assert str(error.value) == message


class TestFromPast:
    def test_accepts_every_form(self) -> None:
        layers = _layers()
        dynamic = transformers.DynamicCache()
        for i, (key, value) in enumerate(layers):
            dynamic.update(key, value, i)
        cache = KVCache(layers)
        assert KVCache.from_past(cache) is cache
        assert _equal(KVCache.from_past(layers), layers)
        assert _equal(KVCache.from_past(tuple(layers)), layers)
        assert _equal(KVCache.from_past([tuple(layer) for layer in layers]), layers)
        assert _equal(KVCache.from_past([[*layer] for layer in layers]), layers)
        assert _equal(KVCache.from_past(dynamic), layers)

    def test_static_caches_hold_only_what_was_written(self) -> None:
        layers = _layers(length=3)
        config = transformers.GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH)
        static = transformers.StaticCache(config=config, max_cache_len=16)
        for i, (key, value) in enumerate(layers):
            static.update(key, value, i)
        assert _equal(KVCache.from_past(static), layers)

    @pytest.mark.parametrize(
        ("past", "message"),
        [
            (3, "cannot read a past from int"),
            ({"a": 1}, "cannot read a past from dict"),
            (torch.zeros(2, 2), "cannot read a past from Tensor"),
            (["x"], "layer 0 of the past must be a [2, batch, heads, time, head size] tensor or "
             "a pair of tensors; got str"),
            ([(torch.zeros(1), torch.zeros(2))], "layer 0 of the past must be a [2, batch, heads, "
             "time, head size] tensor or a pair of tensors; got tuple"),
            ([torch.zeros(2, 1, 1, 1, 1), (torch.zeros(1),)], "layer 1 of the past must be a "
             "[2, batch, heads, time, head size] tensor or a pair of tensors; got tuple"),
        ],
        ids=lambda x: str(type(x)),
    )  # fmt: skip
    def test_refuses_the_rest(self, past: Any, message: str) -> None:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            KVCache.from_past(past)
        assert str(error.value) == message

    def test_a_users_tensors_are_never_written_to(self) -> None:
        storage = torch.randn(2, 1, HEADS, 200, SIZE)
        before, cache = storage.clone(), KVCache([storage[:, :, :, :3]] * 2)
        _appended(cache, [torch.ones(2, 1, HEADS, 5, SIZE)] * 2)
        _appended(cache.crop(1), [torch.ones(2, 1, HEADS, 1, SIZE)] * 2)
        assert torch.equal(storage, before)


class TestGrowth:
    def test_appends_in_place_while_there_is_room(self) -> None:
        cache = KVCache.empty(1, (1, 1, 4), torch.float32, torch.device("cpu"), capacity=65)
        assert (cache.capacity, cache.get_seq_length()) == (128, 0)
        storage = cache.buffers[0].data_ptr()
        for _ in range(128):
            cache = _appended(cache, [torch.randn(2, 1, 1, 1, 4)])
        assert cache.buffers[0].data_ptr() == storage
        assert _appended(cache, [torch.randn(2, 1, 1, 1, 4)]).capacity == 256

    def test_token_by_token_copies_are_amortised(self) -> None:
        cache, copies, expected = (
            KVCache.empty(1, (1, 1, 1), torch.float32, torch.device("cpu")),
            0,
            [],
        )
        for i in range(1000):
            new = torch.full((2, 1, 1, 1, 1), float(i))
            storage = cache.buffers
            cache = _appended(cache, [new])
            copies += cache.buffers is not storage
            expected.append(float(i))
        assert copies <= 6  # 64, 128, ... 1024
        assert cache[0][0].flatten().tolist() == expected

    def test_an_older_cache_copies(self) -> None:
        first = _appended(
            KVCache.empty(LAYERS, (2, HEADS, SIZE), torch.float32, torch.device("cpu"), 9),
            start := _layers(),
        )
        one, two = _layers(length=2), _layers(length=2)
        left = _appended(first, one)
        right = _appended(first, two)
        assert left.buffers is first.buffers is not right.buffers
        assert _equal(first, start)
        assert _equal(left, _cat(start, one))
        assert _equal(right, _cat(start, two))

    def test_an_aborted_append_does_no_harm(self) -> None:
        """A forward pass that fails after it claimed its slots leaves them unused."""
        cache = KVCache.empty(LAYERS, (2, HEADS, SIZE), torch.float32, torch.device("cpu"), 9)
        cache = _appended(cache, start := _layers())
        cache.extended(2)
        assert _equal(_appended(cache, more := _layers(length=1)), _cat(start, more))


class TestViews:
    def test_crop(self) -> None:
        layers = _layers(length=5)
        cache = KVCache(layers)
        short = cache.crop(2)
        assert _equal(short, [layer[:, :, :, :2] for layer in layers])
        assert short.buffers is cache.buffers
        more = _appended(short, _layers(length=3))
        assert _equal(cache, layers)
        assert more.get_seq_length() == 5
        assert cache.crop(0).get_seq_length() == 0
        assert _equal(cache.crop(5), layers)

    @pytest.mark.parametrize("length", [-1, 6])
    def test_crop_out_of_range(self, length: int) -> None:
        with pytest.raises(ValueError, match=rf"^cannot crop a cache of 5 positions to {length}$"):
            KVCache(_layers(length=5)).crop(length)

    @pytest.mark.parametrize("rows", [[0], [1, 0], [2, 2, 0, 1, 1], []], ids=str)
    def test_select(self, rows: list[int]) -> None:
        layers = _layers(batch=3)
        cache = KVCache(layers)
        picked = cache.select(torch.tensor(rows, dtype=torch.long))
        assert _equal(picked, [layer[:, rows] for layer in layers])
        more = _layers(batch=len(rows), length=2)
        assert _equal(_appended(picked, more), _cat(list(picked), more))
        assert _equal(cache, layers)

    def test_select_is_differentiable(self) -> None:
        layers = [layer.requires_grad_() for layer in _layers(batch=2)]
        picked = KVCache(layers).select(torch.tensor([1, 1, 0]))
        sum(layer.sum() for layer in picked).backward()  # type: ignore[union-attr]
        assert layers[0].grad is not None
        assert (layers[0].grad[:, 0] == 1).all()
        assert (layers[0].grad[:, 1] == 2).all()


class TestCopies:
    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
        ids=["deepcopy", "pickle"],
    )
    def test_are_independent_and_small(self, duplicate: Any) -> None:
        cache = KVCache.empty(LAYERS, (2, HEADS, SIZE), torch.float32, torch.device("cpu"), 500)
        cache = _appended(cache, layers := _layers())
        other = duplicate(cache)
        assert _equal(other, layers)
        assert other.capacity == 3  # what is unused does not travel
        other[0].fill_(0)
        assert _equal(cache, layers)

    def test_shared_in_a_structure(self) -> None:
        cache = KVCache(_layers())
        first, second = copy.deepcopy((cache, cache))
        assert _equal(first, list(cache))
        assert _equal(second, list(cache))


class _SlowStorage(_Storage):
    """Gives the other threads their turn between the look at ``filled`` and the change of it."""

    @property
    def filled(self) -> int:  # type: ignore[override]
        value = _Storage.filled.__get__(self)
        time.sleep(1e-3)
        return value

    @filled.setter
    def filled(self, value: int) -> None:
        _Storage.filled.__set__(self, value)


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_append_to_one_past(threads: int) -> None:
    """However they interleave, one writes in place, the others copy, and all are right."""
    empty = KVCache.empty(LAYERS, (2, HEADS, SIZE), torch.float32, torch.device("cpu"), 60)
    past = _appended(empty, start := _layers())
    past._storage = _SlowStorage(past.buffers, past.get_seq_length())
    news = [_layers(length=3) for _ in range(threads)]
    barrier = threading.Barrier(threads)

    def append(new: list[Tensor]) -> KVCache:
        barrier.wait()
        return _appended(past, new)

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(append, news))
    for new, result in zip(news, results, strict=True):
        assert _equal(result, _cat(start, new))
    assert sum(result.buffers is past.buffers for result in results) == 1


class CacheProgram(RuleBasedStateMachine):
    """Any program of appends, crops, selects and copies against plain concatenation.

    Every cache ever made is checked after every step, so a write into somebody else's past shows.
    """

    @initialize(capacity=st.integers(0, 70))
    def start(self, capacity: int) -> None:
        cache = KVCache.empty(1, (2, 1, 1), torch.float32, torch.device("cpu"), capacity)
        self.made = [(cache, torch.empty(2, 2, 1, 0, 1))]
        self.counter = 0

    def _pick(self, index: int) -> tuple[KVCache, Tensor]:
        return self.made[index % len(self.made)]

    @rule(index=st.integers(0, 30), length=st.integers(1, 70))
    def append(self, index: int, length: int) -> None:
        cache, expected = self._pick(index)
        size = (2, expected.shape[1], 1, length, 1)
        new = torch.arange(self.counter, self.counter + torch.Size(size).numel()).float().view(size)
        self.counter += new.numel()
        self.made.append((_appended(cache, [new]), torch.cat((expected, new), 3)))

    @rule(length=st.integers(1, 3))
    def append_to_the_newest(self, length: int) -> None:
        self.append(len(self.made) - 1, length)

    @rule(index=st.integers(0, 30), share=st.floats(0, 1))
    def crop(self, index: int, share: float) -> None:
        cache, expected = self._pick(index)
        length = round(share * cache.get_seq_length())
        self.made.append((cache.crop(length), expected[:, :, :, :length]))

    @rule(index=st.integers(0, 30), rows=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def select(self, index: int, rows: list[int]) -> None:
        cache, expected = self._pick(index)
        self.made.append((cache.select(torch.tensor(rows)), expected[:, rows]))

    @rule(index=st.integers(0, 30))
    def abandon(self, index: int) -> None:
        self._pick(index)[0].extended(1)

    @rule(index=st.integers(0, 30))
    def read_and_wrap(self, index: int) -> None:
        cache, expected = self._pick(index)
        self.made.append((KVCache.from_past(list(cache)), expected))

    @invariant()
    def every_cache_is_what_it_was(self) -> None:
        for cache, expected in getattr(self, "made", []):
            assert torch.equal(cache[0], expected)


TestCacheProgram = CacheProgram.TestCase
TestCacheProgram.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


class ModelProgram(RuleBasedStateMachine):
    """Any tree of continuations of a model against computing each text from scratch."""

    @initialize()
    def start(self) -> None:
        torch.manual_seed(0)
        self.model, _ = pair()
        self.made: list[tuple[Tensor, Any]] = [(torch.empty(2, 0, dtype=torch.long), None)]

    @rule(index=st.integers(0, 9), length=st.integers(1, 5), mode=st.integers(0, 3))
    def go_on(self, index: int, length: int, mode: int) -> None:
        text, past = self.made[index % len(self.made)]
        if text.shape[1] + length > CONTEXT:
            return
        new = tokens(2, length)
        if mode == 0:  # with gradients: the differentiable path
            output = self.model(new, past)
        elif mode == 1:
            with torch.inference_mode():
                output = self.model(new, past)
        else:
            with torch.no_grad():
                output = self.model(new, past)
        text = torch.cat((text, new), 1)
        with torch.no_grad():
            whole = self.model(text, use_cache=False).logits
        assert_forward(output.logits, whole[:, -length:])
        self.made.append((text, output.past_key_values))


TestModelProgram = ModelProgram.TestCase
TestModelProgram.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
