"""Going on from a past: every form of it, its gradients, its limits, and mixed modes."""

import pickle
import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from gpt2fast import KVCache
from tests.models.reference import (
    CONTEXT,
    HEADS,
    KINDS,
    LAYERS,
    WIDTH,
    assert_forward,
    assert_gradients,
    pair,
    tokens,
)


def _forms(past: KVCache) -> dict[str, Any]:
    dynamic = transformers.DynamicCache()
    for i, layer in enumerate(past):
        dynamic.update(layer[0], layer[1], i)
    return {
        "ours": past,
        "list of stacked tensors": list(past),
        "pairs": tuple((layer[0], layer[1]) for layer in past),
        "transformers": dynamic,
        "pickled": pickle.loads(pickle.dumps(past)),
    }


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form(kind: str, grad: bool) -> None:
    ours, reference = pair(kind)
    ids = tokens(2, 11)
    with torch.no_grad():
        want = reference(ids)[0]
    with torch.set_grad_enabled(grad):
        past = ours(ids[:, :6]).past_key_values
        for form in _forms(past).values():
            got = ours(ids[:, 6:], past_key_values=form)
            assert_forward(got[0], want[:, 6:])
            assert got.past_key_values.get_seq_length() == 11
            assert past.get_seq_length() == 6


@pytest.mark.parametrize("grad", [False, True])
def test_cache_of_transformers_is_updated_in_place(grad: bool) -> None:
    ours, reference = pair()
    ids = tokens(2, 11)
    theirs, mine = transformers.DynamicCache(), transformers.DynamicCache()
    for chunk in ids.split([5, 1, 5], 1):
        with torch.set_grad_enabled(grad):
            got = ours(chunk, past_key_values=mine)
        with torch.no_grad():
            want = reference(chunk, past_key_values=theirs)
        assert got.past_key_values is mine
        assert_forward(got.logits, want.logits)
        assert mine.get_seq_length() == theirs.get_seq_length()
        for a, b in zip(mine.layers, theirs.layers, strict=True):
            assert_forward(a.keys, b.keys)
            assert_forward(a.values, b.values)


def test_static_cache_of_transformers() -> None:
    ours, reference = pair()
    ids = tokens(2, 7)
    static = transformers.StaticCache(config=reference.config, max_cache_len=16)
    with torch.no_grad():
        want = reference(ids).logits
        for chunk in (slice(0, 4), slice(4, 5), slice(5, 7)):
            got = ours(ids[:, chunk], past_key_values=static)
            assert_forward(got.logits, want[:, chunk])
    assert int(static.get_seq_length()) == 7


def test_transformers_generates_with_our_numbers() -> None:
    """A cache filled by ours goes on in transformers."""
    ours, reference = pair()
    reference.float()
    ids, cache = tokens(2, 9), transformers.DynamicCache()
    with torch.no_grad():
        ours(ids[:, :6], past_key_values=cache)
        got = reference(ids[:, 6:], past_key_values=cache).logits
        assert_forward(got, reference(ids).logits[:, 6:])


class TestGradientsThroughThePast:
    def test_both_calls_train_one_model(self) -> None:
        ours, reference = pair()
        ids, labels = tokens(2, 11), tokens(2, 5)
        past = ours(ids[:, :6]).past_key_values
        got = ours(ids[:, 6:], past_key_values=past, labels=labels)
        got.loss.backward()
        cache = reference(ids[:, :6]).past_key_values
        want = reference(ids[:, 6:], past_key_values=cache, labels=labels)
        want.loss.backward()
        assert_forward(got.loss, want.loss)
        assert_gradients(ours, reference)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_trained_prefix(self, frozen: bool) -> None:
        """Prefix tuning: the past itself is the parameter, the model may be frozen."""
        ours, reference = pair()
        for model in (ours, reference):
            model.requires_grad_(not frozen)
        prefix = [torch.randn(2, 2, HEADS, 4, WIDTH // HEADS) for _ in range(LAYERS)]
        mine = [layer.clone().requires_grad_() for layer in prefix]
        theirs = [layer.double().requires_grad_() for layer in prefix]
        ids = tokens(2, 5)
        ours(ids, past_key_values=mine, labels=ids).loss.backward()
        cache = transformers.DynamicCache()
        for i, (key, value) in enumerate(theirs):
            cache.update(key, value, i)
        reference(ids, past_key_values=cache, labels=ids).loss.backward()
        for a, b in zip(mine, theirs, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert_forward(a.grad, b.grad)
        assert_gradients(ours, reference)

    def test_a_past_without_gradients_is_a_constant(self) -> None:
        ours, _ = pair()
        ids = tokens(2, 8)
        with torch.no_grad():
            past = ours(ids[:, :5]).past_key_values
            before = [layer.clone() for layer in past]
        ours(ids[:, 5:], past_key_values=past, labels=ids[:, 5:]).loss.backward()
        assert all(p.grad is not None for p in ours.transformer.h.parameters())
        assert all(map(torch.equal, past, before))


class TestModes:
    def test_appends_in_place_without_gradients(self) -> None:
        ours, _ = pair()
        with torch.no_grad():
            past = ours(tokens(1, 3)).past_key_values
            longer = ours(tokens(1, 1), past).past_key_values
            branch = ours(tokens(1, 1), past).past_key_values
        assert longer.buffers is past.buffers
        assert branch.buffers is not past.buffers

    def test_a_hook_may_bring_a_gradient_into_a_frozen_model(self) -> None:
        """As steering vectors do: the default cache must not get into their way."""
        ours, reference = pair()
        ids, gradients = tokens(2, 5), []
        for model in (ours, reference):
            model.requires_grad_(False)
            vector = torch.ones(WIDTH, dtype=model.dtype, requires_grad=True)
            model.transformer.h[0].register_forward_hook(lambda _m, _a, out, v=vector: out + v)
            out = model(ids[:, :3], use_cache=True)
            out = model(ids[:, 3:], past_key_values=out.past_key_values)
            gradients += torch.autograd.grad(out.logits.sin().sum(), vector)
        assert_forward(*gradients)

    def test_inference_caches_outside_of_inference_mode(self) -> None:
        ours, reference = pair()
        ids = tokens(2, 9)
        with torch.no_grad():
            want = reference(ids).logits
        with torch.inference_mode():
            past = ours(ids[:, :6]).past_key_values
        with torch.no_grad():
            got = ours(ids[:, 6:], past)
            picked = past.select(torch.tensor([1]))
            one = ours(ids[1:, 6:], picked)
        assert_forward(got.logits, want[:, 6:])
        assert_forward(one.logits, want[1:, 6:])
        assert past.get_seq_length() == 6

    def test_normal_caches_inside_of_inference_mode(self) -> None:
        ours, reference = pair()
        ids = tokens(2, 9)
        with torch.no_grad():
            want = reference(ids).logits
            past = ours(ids[:, :6]).past_key_values
        with torch.inference_mode():
            inner = ours(ids[:, 6:8], past)
        with torch.no_grad():
            outer = ours(ids[:, 8:], inner.past_key_values)
        assert_forward(inner.logits, want[:, 6:8])
        assert_forward(outer.logits, want[:, 8:])

    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("autocast_first", [False, True])
    def test_across_an_autocast_boundary(self, autocast_first: bool, grad: bool) -> None:
        """Prompt under autocast and tokens without, or the other way round."""
        ours, reference = pair()
        ids, logits, past = tokens(2, 9), [], None
        with torch.set_grad_enabled(grad):
            for chunk, autocast in ((ids[:, :6], autocast_first), (ids[:, 6:], not autocast_first)):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logits, past = ours(chunk, past)
        want = reference(ids).logits[:, 6:]
        assert (logits.double() - want).abs().max() < 0.03 * want.abs().max()
        assert past.get_seq_length() == 9

    def test_batches_of_another_size(self) -> None:
        """One prompt, many continuations: the row is repeated, never computed again."""
        ours, reference = pair()
        prompt, ends = tokens(1, 5), tokens(3, 4)
        with torch.no_grad():
            past = ours(prompt).past_key_values.select(torch.zeros(3, dtype=torch.long))
            got = ours(ends, past).logits
            want = reference(torch.cat((prompt.expand(3, -1), ends), 1)).logits
        assert_forward(got, want[:, 5:])

    def test_threads_share_a_prompt(self) -> None:
        ours, reference = pair()
        prompt, ends = tokens(1, 6), tokens(4, 8)
        with torch.no_grad():
            want = reference(torch.cat((prompt.expand(4, -1), ends), 1)).logits[:, 6:]
            shared = ours(prompt).past_key_values
        results: list[Any] = [None] * 4

        def go_on(i: int) -> None:
            past, logits = shared, []
            with torch.no_grad():
                for token in ends[i : i + 1].split(1, 1):
                    step = ours(token, past)
                    past = step.past_key_values
                    logits.append(step.logits)
            results[i] = torch.cat(logits, 1)

        threads = [threading.Thread(target=go_on, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_forward(torch.cat(results), want)

    def test_memory_is_freed_with_the_last_cache(self) -> None:
        """Nothing but the caches keeps their storage alive."""
        import weakref

        ours, _ = pair()
        with torch.no_grad():
            past = ours(tokens(1, 3)).past_key_values
            past = ours(tokens(1, 1), past).past_key_values
        storage = weakref.ref(past.buffers[0])
        del past
        assert storage() is None


class TestContext:
    def test_up_to_the_last_position(self) -> None:
        ours, reference = pair()
        ids = tokens(1, CONTEXT)
        with torch.no_grad():
            want = reference(ids).logits
            past = ours(ids[:, :-1]).past_key_values
            got = ours(ids[:, -1:], past)
        assert_forward(got.logits, want[:, -1:])
        assert_forward(ours(ids).logits, want)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize(("first", "second"), [(0, CONTEXT + 1), (CONTEXT, 1), (30, 11)])
    def test_beyond_is_an_error_before_anything_is_computed(
        self, first: int, second: int, masked: bool
    ) -> None:
        ours, _ = pair()
        past = None
        with torch.no_grad():
            if first:
                past = ours(tokens(1, first)).past_key_values
            state = None if past is None else ([b.clone() for b in past.buffers], past.capacity)
            calls: list[nn.Module] = []
            for module in ours.modules():
                if module not in (ours, ours.transformer):
                    module.register_forward_pre_hook(lambda module, _: calls.append(module))
            mask = torch.ones(1, first + second) if masked else None
            with pytest.raises(ValueError) as error:  # noqa: PT011
                ours(tokens(1, second), past, attention_mask=mask)
        assert str(error.value) == (
            f"the context holds {CONTEXT} positions; got {first} in the past and {second} new ones"
        )
        assert not calls
        if past is not None and state is not None:
            assert past.get_seq_length() == first
            # Unwritten slots hold anything, NaN too: compare bits.
            for now, then in zip(past.buffers, state[0], strict=True):
                assert torch.equal(now.view(torch.int32), then.view(torch.int32))
            with torch.no_grad():
                grown = past.extended(1)
            assert (grown.buffers is past.buffers) == (past.get_seq_length() < past.capacity)

    def test_cache_of_transformers_is_left_alone(self) -> None:
        ours, _ = pair()
        cache = transformers.DynamicCache()
        with torch.no_grad():
            ours(tokens(1, CONTEXT), past_key_values=cache)
            with pytest.raises(ValueError, match=r"^the context holds 40 positions; got 40 in"):
                ours(tokens(1, 1), past_key_values=cache)
        assert cache.get_seq_length() == CONTEXT

    def test_padding_takes_up_no_position(self) -> None:
        ours, reference = pair()
        ids, mask = tokens(2, CONTEXT + 2), torch.ones(2, CONTEXT + 2)
        mask[0, :2], mask[1, :5] = 0, 0
        with torch.no_grad():
            got = ours(ids, attention_mask=mask).logits
            assert_forward(got[:1, 2:], reference(ids[:1, 2:]).logits)
            assert_forward(got[1:, 5:], reference(ids[1:, 5:]).logits)


def test_the_past_of_a_training_step_is_part_of_the_graph() -> None:
    ours, _ = pair()
    output = ours(tokens(1, 4))
    assert all(layer.requires_grad for layer in output.past_key_values)


def test_no_cache_on_request() -> None:
    ours, _ = pair()
    with torch.no_grad():
        past = ours(tokens(1, 4)).past_key_values
        output = ours(tokens(1, 2), past, use_cache=False)
    assert output.past_key_values is None
    assert past.get_seq_length() == 4


@pytest.mark.parametrize(
    ("shape", "layers", "message"),
    [
        ((2, 1, HEADS, 3, 12), LAYERS, "the past must be 3 layers of [2, 2, 4, 3, 12]; "
         "got 3 of [2, 1, 4, 3, 12]"),
        ((2, 2, HEADS, 3, 12), 2, "the past must be 3 layers of [2, 2, 4, 3, 12]; "
         "got 2 of [2, 2, 4, 3, 12]"),
        ((2, 2, 2, 3, 24), LAYERS, "the past must be 3 layers of [2, 2, 4, 3, 12]; "
         "got 3 of [2, 2, 2, 3, 24]"),
    ],
    ids=str,
)  # fmt: skip
def test_a_past_of_another_model(shape: tuple[int, ...], layers: int, message: str) -> None:
    ours, _ = pair()
    past: list[Tensor] = [torch.zeros(shape) for _ in range(layers)]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ours(tokens(2, 2), past_key_values=past)
    assert str(error.value) == message
