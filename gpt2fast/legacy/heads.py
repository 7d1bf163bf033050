"""The two heads, and the models that carry them."""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gpt2fast import kernels
from gpt2fast.config import GPT2Config as ModernConfig
from gpt2fast.inputs import check_range
from gpt2fast.layers import is_plain
from gpt2fast.legacy.base import GPT2Model, GPT2PreTrainedModel
from gpt2fast.legacy.config import GPT2Config
from gpt2fast.model import pick_positions


class GPT2LMHead(nn.Module):
    """Scores of the next token; the weight is the token embedding's."""

    def __init__(self, model_embeddings_weights: Tensor, config: GPT2Config) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        rows, width = model_embeddings_weights.shape
        self.decoder = nn.Linear(width, rows, bias=False, device="meta")
        self.set_embeddings_weights(model_embeddings_weights, config.predict_special_tokens)

    def set_embeddings_weights(
        self, model_embeddings_weights: Tensor, predict_special_tokens: bool = True
    ) -> None:
        self.predict_special_tokens = predict_special_tokens
        self.decoder.weight = model_embeddings_weights
        self.decoder.out_features = len(model_embeddings_weights)

    def forward(self, hidden_state: Tensor) -> Tensor:
        """``[..., C]`` to logits ``[..., V]``, V with the special tokens if they are predicted."""
        logits = self.decoder(hidden_state)
        return logits if self.predict_special_tokens else logits[..., : self.vocab_size]

    def loss(self, hidden_state: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of each position's prediction of the next label, where not -1.

        Args:
            hidden_state: ``[..., T, C]``.
            labels: ``[..., T]`` integers, shifted here.

        Raises:
            ValueError: labels of another shape or out of range.
        """
        if labels.shape != hidden_state.shape[:-1]:
            raise ValueError(
                f"lm_labels must be {list(hidden_state.shape[:-1])}, as the input; "
                f"got {list(labels.shape)}"
            )
        rows = hidden_state[..., :-1, :].flatten(0, -2)
        targets = labels[..., 1:].flatten().to(rows.device)
        if is_plain(self, GPT2LMHead) and is_plain(self.decoder, nn.Linear):
            weight = self.decoder.weight
            if not self.predict_special_tokens:
                weight = weight[: self.vocab_size]
            return kernels.lm_head_loss(rows, weight, targets, ignore_index=-1)
        logits = self(rows).float()
        check_range("lm_labels", targets.masked_fill(targets == -1, 0), logits.shape[-1])
        return F.cross_entropy(logits, targets.long(), ignore_index=-1)


class GPT2MultipleChoiceHead(nn.Module):
    """One score a choice, from the hidden state at one position of each."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        # Drops a feature from all the choices of an example alike.
        self.dropout = nn.Dropout1d(config.resid_pdrop)
        self.linear = nn.Linear(config.n_embd, 1)

    def forward(self, hidden_states: Tensor, mc_token_ids: Tensor) -> Tensor:
        """``[B, choices, T, C]`` and positions ``[B, choices]`` to scores ``[B, choices]``."""
        picked = pick_positions(hidden_states, mc_token_ids)
        picked = self.dropout(picked.transpose(-1, -2)).transpose(-1, -2)
        return self.linear(picked).squeeze(-1)


class _HeadModel(GPT2PreTrainedModel):
    def __init__(self, config: ModernConfig) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(self.config)
        self.lm_head = GPT2LMHead(self.transformer.wte.weight, self.config)

    def tie_weights(self) -> None:
        self.lm_head.set_embeddings_weights(
            self.transformer.wte.weight, self.config.predict_special_tokens
        )

    def set_num_special_tokens(
        self, num_special_tokens: int, predict_special_tokens: bool = True
    ) -> None:
        self.transformer.set_num_special_tokens(num_special_tokens, predict_special_tokens)
        self.tie_weights()


class GPT2LMHeadModel(_HeadModel):
    """GPT-2 with the language-model head, tied to the token embedding.

    Args:
        config: a `GPT2Config` of either generation; weights are freshly initialised.
    """

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        lm_labels: Tensor | None = None,
        past: Iterable[Tensor] | None = None,
    ) -> Any:
        """Logits and presents, or the loss.

        Args:
            lm_labels: ``[..., T]``, -1 where ignored; shifted here, so ``input_ids`` will do.
            (the others): as `GPT2Model.forward`.

        Returns:
            Without labels ``(logits [..., T, V], presents)``, after the attention weights where
            `GPT2Model` returns them; with labels the mean loss, a scalar (NaN where none is kept).

        Raises:
            ValueError: as `GPT2Model.forward`; labels of another shape or out of range.
        """
        *attentions, hidden, presents = self.transformer(
            input_ids, position_ids, token_type_ids, past, use_cache=lm_labels is None
        )
        if lm_labels is not None:
            return self.lm_head.loss(hidden, lm_labels)
        return *attentions, self.lm_head(hidden), presents


class GPT2DoubleHeadsModel(_HeadModel):
    """GPT-2 with a language-model head and a multiple-choice head.

    Args:
        config: a `GPT2Config` of either generation; weights are freshly initialised.
    """

    def __init__(self, config: ModernConfig) -> None:
        super().__init__(config)
        self.multiple_choice_head = GPT2MultipleChoiceHead(self.config)
        for name, parameter in self.multiple_choice_head.named_parameters():
            self._init_parameter(name, parameter)

    def forward(
        self,
        input_ids: Tensor,
        mc_token_ids: Tensor,
        lm_labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Iterable[Tensor] | None = None,
    ) -> Any:
        """Logits, scores and presents, or the losses.

        Args:
            input_ids: ``[B, choices, T]``, padded on the right.
            mc_token_ids: ``[B, choices]``, the position that each choice is scored at: its last
                real token.
            lm_labels: ``[B, choices, T]``, as in `GPT2LMHeadModel.forward`.
            mc_labels: ``[B]``, the right choice.
            (the others): as `GPT2Model.forward`.

        Returns:
            Without labels ``(logits [B, choices, T, V], scores [B, choices], presents)``, after the
            attention weights where `GPT2Model` returns them; with labels the list of the losses
            asked for, the language model's first.

        Raises:
            ValueError: as `GPT2LMHeadModel.forward`; positions or choices out of range.
        """
        labelled = lm_labels is not None or mc_labels is not None
        *attentions, hidden, presents = self.transformer(
            input_ids, position_ids, token_type_ids, past, use_cache=not labelled
        )
        if not labelled:
            scores = self.multiple_choice_head(hidden, mc_token_ids)
            return *attentions, self.lm_head(hidden), scores, presents
        losses = []
        if lm_labels is not None:
            losses.append(self.lm_head.loss(hidden, lm_labels))
        if mc_labels is not None:
            scores = self.multiple_choice_head(hidden, mc_token_ids).flatten(0, -2)
            targets = mc_labels.flatten().to(scores.device)
            if len(targets) != len(scores):
                raise ValueError(
                    f"mc_labels must hold {len(scores)} choices; got {list(mc_labels.shape)}"
                )
            check_range("mc_labels", targets.masked_fill(targets == -100, 0), scores.shape[-1])
            losses.append(F.cross_entropy(scores, targets.long()))
        return losses
