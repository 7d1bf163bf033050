"""How labels become a loss: counting, shifting, nothing to predict, and unusual heads."""

import inspect

import pytest
import torch
from transformers.utils.generic import find_labels

from tests.models.reference import (
    VOCAB,
    WIDTH,
    assert_forward,
    assert_gradients,
    pair,
    tokens,
)


class TestLosses:
    @pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor(3.5)], ids=str)
    def test_num_items_in_batch(self, items: int | torch.Tensor) -> None:
        ours, reference = pair()
        ids = tokens(3, 6)
        got = ours(ids, labels=ids, num_items_in_batch=items)
        want = reference(ids, labels=ids, num_items_in_batch=items)
        assert_forward(got.loss, want.loss)
        got.loss.backward()
        want.loss.backward()
        assert_gradients(ours, reference)

    def test_accumulated_pieces_equal_the_batch(self) -> None:
        ours, reference = pair()
        ids = tokens(4, 6)
        reference(ids, labels=ids).loss.backward()
        for row in ids:
            ours(row[None], labels=row[None], num_items_in_batch=4 * 5).loss.backward()
        assert_gradients(ours, reference)

    def test_shifted_labels(self) -> None:
        ours, _ = pair()
        ids = tokens(2, 6)
        shifted = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), 1)
        with torch.no_grad():
            want = ours(ids, labels=ids).loss
            assert torch.allclose(ours(ids, shift_labels=shifted).loss, want)

    def test_the_trainer_finds_labels_and_passes_counts(self) -> None:
        """It looks at the signature: evaluation has a loss only where all it finds are given."""
        ours, reference = pair()
        assert find_labels(type(ours)) == find_labels(type(reference)) == ["labels"]
        parameters = inspect.signature(ours.forward).parameters.values()
        assert any(p.kind is p.VAR_KEYWORD for p in parameters)
        with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
            ours(tokens(1, 3), label=tokens(1, 3))

    @pytest.mark.parametrize("length", [1, 5])
    def test_nothing_to_predict(self, length: int) -> None:
        """The mean of no losses is NaN, as in transformers; the gradients are zero."""
        ours, reference = pair()
        ids = tokens(2, length)
        labels = torch.full_like(ids, -100) if length > 1 else ids
        got, want = ours(ids, labels=labels), reference(ids, labels=labels)
        assert got.loss.isnan()
        assert want.loss.isnan()
        got.loss.backward()
        assert all((p.grad == 0).all() for p in ours.parameters())

    def test_a_head_with_a_bias_or_a_hook(self) -> None:
        """A head that is no plain linear layer is called, not fused."""
        ours, _ = pair()
        ids = tokens(2, 6)
        with torch.no_grad():
            want = ours(ids, labels=ids)
            seen = []
            handle = ours.lm_head.register_forward_hook(lambda *_: seen.append(1))
            hooked = ours(ids, labels=ids)
            handle.remove()
            assert seen == [1]
            assert torch.allclose(hooked.loss, want.loss)
            head = torch.nn.Linear(WIDTH, VOCAB)
            head.weight = ours.lm_head.weight
            ours.lm_head = head
            biased = ours(ids, labels=ids)
        assert torch.allclose(biased.logits, want.logits + head.bias, atol=1e-6)
        assert not torch.allclose(biased.loss, want.loss)
