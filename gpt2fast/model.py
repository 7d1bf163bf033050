"""GPT-2 with heads: the language model and the double heads.

One head predicts the next token, tied to the token embedding; the other scores each of several
candidate endings (Radford et al., *Improving Language Understanding by Generative Pre-Training*,
2018, section 3.2).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2fast import kernels
from gpt2fast.base import PreTrainedModel
from gpt2fast.config import GPT2Config
from gpt2fast.generation import GenerationMixin
from gpt2fast.inputs import check_range
from gpt2fast.layers import is_plain
from gpt2fast.outputs import CausalLMOutput, DeferredLogits, DoubleHeadsOutput, as_returned
from gpt2fast.quantized_layers import QuantizedHead
from gpt2fast.transformer import GPT2Model, resized_rows

__all__ = ["GPT2DoubleHeadsModel", "GPT2LMHeadModel", "GPT2Model"]


class _HeadModel(GenerationMixin, PreTrainedModel):
    """A transformer with the language-model head on it, tied where the configuration says so."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        config = self.config
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False, device="meta")
        if config.tie_word_embeddings:
            self.tie_weights()
        else:
            self.lm_head.to_empty(device=self.transformer.wte.weight.device)

    def tie_weights(self) -> None:
        """Make the head's weight the token embedding's, if the configuration ties them."""
        if not self.config.tie_word_embeddings:
            return
        if isinstance(self.lm_head, QuantizedHead):
            self.lm_head.tie(self.transformer.wte)
        else:
            self.lm_head.weight = self.transformer.wte.weight

    def _init_heads(self) -> None:
        for name, parameter in self.named_parameters():
            if not name.startswith("transformer."):
                self._init_parameter(name, parameter)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self.transformer.wte = embeddings

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, embeddings: nn.Linear) -> None:
        self.lm_head = embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """As `GPT2Model.resize_token_embeddings`; the head follows."""
        embeddings = self.transformer.resize_token_embeddings(new_num_tokens, pad_to_multiple_of)
        head = self.lm_head
        if self.config.tie_word_embeddings:
            head.weight = embeddings.weight
        else:
            weight = resized_rows(head.weight, embeddings.num_embeddings)
            head.weight = nn.Parameter(weight, requires_grad=head.weight.requires_grad)
        head.out_features = embeddings.num_embeddings
        return embeddings

    def _logits_and_loss(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        shift: bool = True,
    ) -> tuple[Tensor | DeferredLogits, Tensor | None]:
        """Logits ``[..., T, V]`` and, with labels, the loss; logits are then left uncomputed."""
        if labels is None:
            return self.lm_head(hidden), None
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels must be {list(hidden.shape[:-1])}, as the logits; got {list(labels.shape)}"
            )
        labels = labels.to(hidden.device)
        kept = hidden[..., :-1, :] if shift else hidden
        targets = (labels[..., 1:] if shift else labels).reshape(-1)
        reduction = "mean" if num_items_in_batch is None else "sum"
        head = self.lm_head
        logits: Tensor | DeferredLogits
        if is_plain(head, nn.Linear) and head.bias is None:
            rows = kept.reshape(-1, hidden.shape[-1])
            loss = kernels.lm_head_loss(rows, head.weight, targets, reduction=reduction)
            logits = DeferredLogits.of(hidden, head.weight)
        else:
            logits = scores = head(hidden)
            rows = (scores[..., :-1, :] if shift else scores).flatten(0, -2).float()
            check_range("labels", targets.masked_fill(targets == -100, 0), rows.shape[1])
            loss = F.cross_entropy(rows, targets.long(), ignore_index=-100, reduction=reduction)
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        return logits, loss


class GPT2LMHeadModel(_HeadModel):
    """GPT-2 with the language-model head, tied to the token embedding by default.

    Args:
        config: sizes and options; weights are freshly initialised.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self._init_heads()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        head_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        # Not by name: transformers' Trainer takes every "label" in the signature for required.
        **loss_options: Tensor | None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Logits of every position and, with labels, the language-model loss.

        With labels the loss is computed without the ``[tokens, vocabulary]`` logits, which are
        computed only if they are read.

        Args:
            labels: ``[..., T]``, -100 where ignored; shifted here, so ``labels=input_ids`` works.
                The loss is the mean over the kept labels (NaN where there is none).
            logits_to_keep: only the last so many positions (0: all), or these positions.
            num_items_in_batch: divide the summed loss by this instead (gradient accumulation).
            shift_labels: labels that the caller has shifted already; ``labels`` is then not read.
            (the others): as `GPT2Model.forward`.

        Raises:
            ValueError: as `GPT2Model.forward`; labels of another shape or out of range.
            TypeError: an unknown keyword.
        """
        shift_labels = loss_options.pop("shift_labels", None)
        if loss_options:
            raise TypeError(f"forward got an unexpected keyword argument {min(loss_options)!r}")
        body = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            head_mask,
        )
        hidden = _keep(body.last_hidden_state, logits_to_keep)
        logits, loss = self._logits_and_loss(
            hidden,
            labels if shift_labels is None else shift_labels,
            num_items_in_batch,
            shift=shift_labels is None,
        )
        output = CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return as_returned(output, return_dict, self.config)


class SequenceSummary(nn.Module):
    """One vector a sequence, projected: the multiple-choice head.

    ``summary_type`` picks the position ("cls_index": the one given, by default the last); the
    projection goes to one score, or keeps the width where ``summary_proj_to_labels`` is False.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.summary_type = config.summary_type
        width = config.n_embd
        self.summary: nn.Module = nn.Identity()
        if config.summary_use_proj:
            self.summary = nn.Linear(width, 1 if config.summary_proj_to_labels else width)
        self.activation = nn.Tanh() if config.summary_activation == "tanh" else nn.Identity()
        self.first_dropout = nn.Dropout(config.summary_first_dropout)

    def forward(self, hidden_states: Tensor, cls_index: Tensor | None = None) -> Tensor:
        """``[..., T, C]`` and positions ``[...]`` to ``[..., 1]`` (or ``[..., C]``)."""
        if self.summary_type == "first":
            picked = hidden_states[..., 0, :]
        elif self.summary_type == "mean":
            picked = hidden_states.mean(-2)
        elif self.summary_type == "last" or cls_index is None:
            picked = hidden_states[..., -1, :]
        else:
            picked = pick_positions(hidden_states, cls_index)
        return self.activation(self.summary(self.first_dropout(picked)))


def pick_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """``hidden[..., positions[...], :]`` for hidden ``[..., T, C]``."""
    if positions.shape != hidden.shape[:-2]:
        raise ValueError(
            f"mc_token_ids must be {list(hidden.shape[:-2])}, one position a sequence; "
            f"got {list(positions.shape)}"
        )
    check_range("mc_token_ids", positions, hidden.shape[-2])
    index = positions.to(hidden.device, torch.long)[..., None, None]
    index = index.expand(*positions.shape, 1, hidden.shape[-1])
    return hidden.gather(-2, index).squeeze(-2)


class GPT2DoubleHeadsModel(_HeadModel):
    """GPT-2 with a language-model head and a multiple-choice head.

    Args:
        config: sizes and options; weights are freshly initialised.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.multiple_choice_head = SequenceSummary(self.config)
        self._init_heads()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        head_mask: Tensor | None = None,
    ) -> DoubleHeadsOutput | tuple[Any, ...]:
        """Next-token logits and a score for each choice.

        Args:
            input_ids: ``[B, choices, T]``.
            mc_token_ids: ``[B, choices]``, the position that each choice is scored at; default the
                last. Pad on the right and point it at the last real token.
            labels: ``[B, choices, T]``, as in `GPT2LMHeadModel.forward`.
            mc_labels: ``[B]``, the right choice.
            (the others): as `GPT2Model.forward`.

        Returns:
            ``loss``, ``mc_loss``, ``logits`` ``[B, choices, T, V]``, ``mc_logits``
            ``[B, choices]``, ``past_key_values``, and what else was asked for.

        Raises:
            ValueError: as `GPT2LMHeadModel.forward`; positions or choices out of range.
        """
        body = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            None,
            None,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            head_mask,
        )
        hidden = body.last_hidden_state
        mc_logits = self.multiple_choice_head(hidden, mc_token_ids).squeeze(-1)
        logits, loss = self._logits_and_loss(hidden, labels)
        mc_loss = None
        if mc_labels is not None:
            rows = mc_logits.view(-1, mc_logits.shape[-1])
            targets = mc_labels.to(rows.device).flatten()
            if len(targets) != len(rows):
                raise ValueError(
                    f"mc_labels must hold {len(rows)} choices; got {list(mc_labels.shape)}"
                )
            check_range("mc_labels", targets.masked_fill(targets == -100, 0), rows.shape[1])
            mc_loss = F.cross_entropy(rows, targets.long())
        output = DoubleHeadsOutput(
            loss=loss,
            mc_loss=mc_loss,
            logits=logits,
            mc_logits=mc_logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return as_returned(output, return_dict, self.config)


def _keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions of hidden ``[..., T, C]`` whose logits are wanted."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1:
            raise ValueError(
                f"logits_to_keep must be an integer or 1-D; got {list(logits_to_keep.shape)}"
            )
        check_range("logits_to_keep", logits_to_keep, hidden.shape[-2])
        return hidden[..., logits_to_keep, :]
    if logits_to_keep < 0:
        raise ValueError(f"logits_to_keep must be at least 0; got {logits_to_keep}")
    return hidden[..., -logits_to_keep:, :] if logits_to_keep else hidden
