"""Attention masks of every kind against transformers, which is told the positions."""

import pytest
import torch

from tests.models.reference import (
    HEADS,
    assert_forward,
    assert_gradients,
    padding,
    pair,
    positions_under,
    tokens,
)


class TestMasks:
    @pytest.mark.parametrize("kind", ["left", "right", "inner", "none"])
    def test_padding(self, kind: str) -> None:
        """On the real tokens, with the gradients of a loss over them alone."""
        ours, reference = pair()
        ids, mask = tokens(3, 9), padding(kind, 3, 9)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 1:][mask[:, :-1] == 0] = -100  # a padding position predicts nothing
        got = ours(ids, attention_mask=mask, labels=labels)
        want = reference(
            ids, attention_mask=mask, position_ids=positions_under(mask), labels=labels
        )
        assert_forward(got.logits, want.logits, keep=mask.bool())
        assert_forward(got.loss, want.loss)
        got.loss.backward()
        want.loss.backward()
        assert_gradients(ours, reference)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_each_row_is_as_if_alone(self, side: str) -> None:
        ours, _ = pair()
        ids, mask = tokens(3, 9), padding(side, 3, 9)
        with torch.no_grad():
            together = ours(ids, attention_mask=mask).logits
            for row in range(3):
                kept = mask[row].bool()
                alone = ours(ids[row][kept][None]).logits[0]
                assert torch.allclose(together[row][kept], alone, atol=2e-6)

    def test_padding_stays_finite(self) -> None:
        ours, _ = pair()
        ids = tokens(2, 6)
        for mask in (torch.zeros(2, 6), padding("left", 2, 6)):
            output = ours(ids, attention_mask=mask, output_hidden_states=True)
            assert all(torch.isfinite(h).all() for h in output.hidden_states)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32, torch.uint8])
    def test_any_dtype(self, dtype: torch.dtype) -> None:
        ours, _ = pair()
        ids, mask = tokens(3, 9), padding("left", 3, 9)
        with torch.no_grad():
            want = ours(ids, attention_mask=mask).logits
            assert torch.equal(ours(ids, attention_mask=mask.to(dtype)).logits, want)

    def test_given_positions_win(self) -> None:
        ours, reference = pair()
        ids, mask = tokens(3, 9), padding("left", 3, 9)
        positions = torch.arange(9)[None]
        with torch.no_grad():
            got = ours(ids, attention_mask=mask, position_ids=positions)
            want = reference(ids, attention_mask=mask)
        assert_forward(got.logits, want.logits, keep=mask.bool())

    @pytest.mark.parametrize("side", ["left", "right", "inner"])
    def test_with_a_past(self, side: str) -> None:
        ours, reference = pair()
        ids, mask = tokens(3, 12), padding(side, 3, 12)
        if side == "right":
            mask[:, -1] = 1  # a gap before the next token
        positions = positions_under(mask)
        with torch.no_grad():
            want = reference(ids, attention_mask=mask, position_ids=positions).logits
            past = ours(ids[:, :8], attention_mask=mask[:, :8]).past_key_values
            for chunk in (slice(8, 11), slice(11, 12)):
                got = ours(ids[:, chunk], past, attention_mask=mask[:, : chunk.stop])
                past = got.past_key_values
                assert_forward(got.logits, want[:, chunk], keep=mask[:, chunk].bool())

    @pytest.mark.parametrize("form", [(1, 1), (2, 1), (2, HEADS)], ids=str)
    @pytest.mark.parametrize("float_mask", [False, True])
    def test_complete_masks(self, form: tuple[int, int], float_mask: bool) -> None:
        ours, reference = pair()
        ids = tokens(2, 6)
        mask = torch.rand(*form, 6, 6) < 0.6
        mask |= torch.eye(6, dtype=torch.bool)
        theirs = mask
        if float_mask:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            theirs = mask.double()
        got = ours(ids, attention_mask=mask, labels=ids)
        want = reference(ids, attention_mask=theirs, labels=ids)
        got.loss.backward()
        want.loss.backward()
        assert_forward(got.logits, want.logits)
        assert_gradients(ours, reference)

    def test_complete_mask_with_a_past(self) -> None:
        ours, reference = pair()
        ids = tokens(2, 9)
        mask = (torch.rand(2, 1, 9, 9) < 0.6) | torch.eye(9, dtype=torch.bool)
        mask = mask & torch.ones(9, 9, dtype=torch.bool).tril()
        with torch.no_grad():
            want = reference(ids, attention_mask=mask).logits
            first = ours(ids[:, :5], attention_mask=mask[:, :, :5, :5])
            second = ours(ids[:, 5:], first.past_key_values, mask[:, :, 5:])
        assert_forward(torch.cat((first.logits, second.logits), 1), want)

    def test_float32_mask_for_a_bfloat16_model(self) -> None:
        ours, _ = pair()
        ours.bfloat16()
        ids, mask = tokens(2, 6), torch.randn(2, 1, 6, 6)
        with torch.no_grad():
            want = ours(ids, attention_mask=mask.bfloat16()).logits
            assert torch.equal(ours(ids, attention_mask=mask).logits, want)
