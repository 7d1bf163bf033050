"""Fresh weights, and embeddings of another size."""

import pytest
import torch

import gpt2fast
from tests.models.reference import (
    KINDS,
    VOCAB,
    WIDTH,
    assert_forward,
    pair,
    sizes,
)


class TestResize:
    @pytest.mark.parametrize("rows", [VOCAB + 5, VOCAB - 20, VOCAB])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_forward_and_backward(self, kind: str, tied: bool, rows: int) -> None:
        ours, _ = pair(kind, tie_word_embeddings=tied)
        ids = torch.randint(min(rows, VOCAB), (2, 5))
        with torch.no_grad():
            before = ours(ids)[0]
        embedding = ours.resize_token_embeddings(rows)
        assert ours.get_input_embeddings() is embedding
        assert embedding.weight.shape == (rows, WIDTH)
        assert ours.config.vocab_size == rows
        after = ours(ids)[0]
        if kind == "GPT2Model":
            assert torch.equal(after, before)
            return
        kept = min(rows, VOCAB)
        assert after.shape[-1] == ours.lm_head.out_features == rows
        assert torch.allclose(after[..., :kept], before[..., :kept], atol=1e-6)
        assert (ours.lm_head.weight is embedding.weight) == tied
        loss = ours(torch.full((1, 4), rows - 1), labels=torch.full((1, 4), rows - 1)).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert embedding.weight.grad is not None
        assert embedding.weight.grad[rows - 1].abs().sum() > 0
        with pytest.raises(ValueError, match=rf"^input_ids must be in \[0, {rows}\); got {rows}$"):
            ours(torch.tensor([[rows]]))

    def test_new_rows_start_at_the_mean(self) -> None:
        ours, _ = pair()
        mean = ours.transformer.wte.weight.mean(0)
        weight = ours.resize_token_embeddings(VOCAB + 3).weight
        assert torch.allclose(weight[VOCAB:], mean.expand(3, -1), atol=1e-6)

    def test_like_transformers(self) -> None:
        """The same logits of old tokens after the same resizing, cut or grown."""
        ours, reference = pair()
        ids = torch.randint(50, (2, 5))
        for model in (ours, reference):
            model.resize_token_embeddings(60)
        with torch.no_grad():
            assert_forward(ours(ids).logits, reference(ids).logits)

    def test_padded_to_a_multiple(self) -> None:
        ours, _ = pair()
        assert ours.resize_token_embeddings(VOCAB, pad_to_multiple_of=64).num_embeddings == 128
        assert ours.config.vocab_size == 128

    def test_frozen_stays_frozen(self) -> None:
        ours, _ = pair(tie_word_embeddings=False)
        ours.requires_grad_(False)
        ours.resize_token_embeddings(VOCAB + 1)
        assert not any(p.requires_grad for p in ours.parameters())

    @pytest.mark.parametrize("rows", [0, -3])
    def test_impossible(self, rows: int) -> None:
        ours, _ = pair()
        with pytest.raises(ValueError, match=rf"^new_num_tokens must be positive; got {rows}$"):
            ours.resize_token_embeddings(rows)
        assert ours.config.vocab_size == VOCAB


class TestInitialisation:
    def test_scheme(self) -> None:
        config = gpt2fast.GPT2Config(**sizes(n_embd=256, n_layer=2, initializer_range=0.05))
        model = gpt2fast.GPT2DoubleHeadsModel(config).requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                assert (parameter == 0).all(), name
            elif ".ln_" in name:
                assert (parameter == 1).all(), name
            else:
                std = 0.05 / 2 if "c_proj" in name else 0.05  # 1/sqrt(2 * 2 layers)
                relative = 4 / (2 * parameter.numel()) ** 0.5  # four standard errors
                assert float(parameter.std()) == pytest.approx(std, rel=relative), name

    def test_same_seed_same_weights(self) -> None:
        models = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            models.append(gpt2fast.GPT2LMHeadModel(gpt2fast.GPT2Config(**sizes())))
        first, same, other = (m.transformer.h[0].mlp.c_fc.weight for m in models)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)

    def test_default_dtype(self) -> None:
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = gpt2fast.GPT2LMHeadModel(gpt2fast.GPT2Config(**sizes()))
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
