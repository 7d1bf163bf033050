"""The transformer of GPT-2, without a head.

Radford et al., *Language Models are Unsupervised Multitask Learners* (2019). Signatures, parameter
names and numbers follow today's transformers; where this package differs it says so.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2fast import kernels, replay
from gpt2fast.base import PreTrainedModel
from gpt2fast.cache import KVCache, is_foreign
from gpt2fast.config import GPT2Config
from gpt2fast.inputs import ModelInputs, prepare_inputs
from gpt2fast.layers import GPT2Block, LayerNorm, LayerPass, drops, is_plain
from gpt2fast.outputs import BaseModelOutput, as_returned


def _embedding(rows: int, width: int) -> nn.Embedding:
    # Values come from `init_weights` or a checkpoint: skip the default initialisation.
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class GPT2Model(PreTrainedModel):
    """The transformer without a head: token ids to hidden states.

    Args:
        config: sizes and options; weights are freshly initialised.
    """

    base_model_prefix = ""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        config = self.config
        self.wte = _embedding(config.embedding_rows, config.n_embd)
        self.wpe = _embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.init_weights()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, as transformers' code asks for it."""
        return self.wte

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        """Put another token embedding in its place."""
        self.wte = embeddings

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
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        head_mask: Tensor | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Hidden states of every position.

        Args:
            input_ids: ``[..., T]`` integers in ``[0, vocab_size)``; leading dimensions are
                flattened into the batch B. Only the new tokens where a past is given.
            past_key_values: what a former call returned, a list of ``[2, B, H, P, D]`` tensors,
                (key, value) pairs, or a transformers Cache (which is then updated in place).
            attention_mask: ``[B, P + T]``, 0 for padding (positions are then counted over the
                kept tokens); or a complete 4-D mask for the attention ops.
            token_type_ids: ``[..., T]``, embedded with the token embedding.
            position_ids: ``[..., T]`` or ``[T]``; overrides the derived positions.
            inputs_embeds: ``[..., T, C]`` instead of ``input_ids``.
            encoder_hidden_states, encoder_attention_mask: not supported; they hold their place.
            use_cache: return the past, including this call; default ``config.use_cache``.
            output_attentions: return every layer's weights ``[B, H, T, P + T]``.
            output_hidden_states: return the embedding's and every block's output, the last one
                after the final LayerNorm: L + 1 tensors.
            return_dict: False for a plain tuple.
            head_mask: ``[H]`` or ``[L, H]``, multiplied with the attention weights (1 keeps).

        Raises:
            ValueError: ids or positions out of range, shapes that do not agree, empty input.
        """
        config = self.config
        if encoder_hidden_states is not None or encoder_attention_mask is not None:
            raise ValueError("encoder_hidden_states is not supported: GPT-2 is a decoder alone")
        if use_cache is None:
            use_cache = config.use_cache
        if output_attentions is None:
            output_attentions = bool(getattr(config, "output_attentions", False))
        if output_hidden_states is None:
            output_hidden_states = bool(getattr(config, "output_hidden_states", False))
        recompute = self.gradient_checkpointing and self.training
        if recompute:
            use_cache = False  # the past would be built twice, and keep what is to be dropped
        if (
            type(self) is GPT2Model
            and input_ids is not None
            and not (
                torch.is_grad_enabled()
                or torch.compiler.is_compiling()
                or output_attentions
                or output_hidden_states
                or past_key_values is not None
                or attention_mask is not None
                or token_type_ids is not None
                or position_ids is not None
                or inputs_embeds is not None
                or head_mask is not None
            )
        ):
            found = replay.replayed(self, input_ids, use_cache)
            if found is not None:
                hidden, cache = found
                return as_returned(
                    BaseModelOutput(
                        last_hidden_state=hidden.view(*input_ids.shape, hidden.shape[-1]),
                        past_key_values=cache,
                    ),
                    return_dict,
                    config,
                )
        foreign = past_key_values if is_foreign(past_key_values) else None
        inputs = prepare_inputs(
            config,
            input_ids,
            inputs_embeds,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            next((p.device for p in self.wpe.parameters() if not p.is_meta), None),
        )
        hidden, normed = self._embed(inputs, fuse=not recompute)

        past = inputs.past
        plain = use_cache and not output_attentions and head_mask is None
        in_place = plain and self._appends_in_place()
        grown: KVCache | None = None
        if in_place:
            if past is None:
                shape = (hidden.shape[0], config.n_head, config.head_size)
                dtype = compute_dtype(hidden.dtype, hidden.device)
                room = hidden.shape[1] + 1  # the usual next call brings one more token
                past = KVCache.empty(config.n_layer, shape, dtype, hidden.device, room)
            grown = past.extended(hidden.shape[1])
        heads = None if head_mask is None else _layer_head_masks(head_mask, config, hidden.device)
        passes = [
            LayerPass(
                mask=inputs.mask,
                past_kv=None if past is None or in_place else past[i],
                buffer=None if grown is None else grown.buffers[i],
                start=inputs.past_length,
                head_mask=None if heads is None else heads[i],
                normed=normed if i == 0 else None,
                keep_weights=output_attentions,
                keep_kv=use_cache and not in_place,
            )
            for i in range(config.n_layer)
        ]
        states = []
        for block, layer_pass in zip(self.h, passes, strict=True):
            if output_hidden_states:
                states.append(hidden)
            if recompute:
                hidden = checkpoint(block, hidden, layer_pass, use_reentrant=False)
            else:
                hidden = block(hidden, layer_pass)
        hidden = self.ln_f(hidden)
        states.append(hidden)

        present: Any = grown
        if use_cache and not in_place:
            present = KVCache([p.kv for p in passes if p.kv is not None])
        if foreign is not None and use_cache:
            present = _update_foreign(foreign, present, inputs.past_length)
        lead = inputs.lead
        output = BaseModelOutput(
            last_hidden_state=hidden.view(*lead, *hidden.shape[1:]),
            past_key_values=present,
            hidden_states=tuple(s.view(*lead, *s.shape[1:]) for s in states)
            if output_hidden_states
            else None,
            attentions=tuple(p.weights for p in passes) if output_attentions else None,
        )
        return as_returned(output, return_dict, config)

    def _apply(self, fn: Any, recurse: bool = True) -> "GPT2Model":
        """As `torch.nn.Module`, for ``to`` and its kind; what is recorded has its memory back."""
        replay.forget(self)
        return super()._apply(fn, recurse)

    def _embed(self, inputs: ModelInputs, fuse: bool) -> tuple[Tensor, Tensor | None]:
        """``[B, T, C]``, and the first block's ``ln_1`` of it where both may be one op.

        Goes through the modules where somebody has hooked or replaced them.
        """
        ids, positions, types = inputs.input_ids, inputs.position_ids, inputs.token_type_ids
        if ids is None or not (
            is_plain(self.wte, nn.Embedding) and is_plain(self.wpe, nn.Embedding)
        ):
            tokens = self.wte(ids) if inputs.inputs_embeds is None else inputs.inputs_embeds
            hidden = tokens + self.wpe(positions)
            return self.drop(hidden if types is None else hidden + self.wte(types)), None
        tables = self.wte.weight, self.wpe.weight
        first = self.h[0]
        if not (
            fuse
            and not drops(self.drop)
            and is_plain(first, GPT2Block)
            and is_plain(first.ln_1, LayerNorm)
        ):
            return self.drop(kernels.embedding(ids, positions, types, *tables)), None
        ln_1 = first.ln_1
        normed, hidden = kernels.embedding_layer_norm(
            ids, positions, types, *tables, ln_1.weight, ln_1.bias, ln_1.eps
        )
        return hidden, normed

    def _appends_in_place(self) -> bool:
        """Whether keys and values may be written into a preallocated cache.

        Only where autograd is off: a hook may bring a gradient into any layer of a frozen model.
        """
        return not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()  # the cache's bookkeeping is not for tracing
            or any(block.training for block in self.h)  # dropout is for the differentiable op
        )

    def resize_token_embeddings(
        self, new_num_tokens: int, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Change the number of token embeddings; new rows start at the mean of the old ones.

        Args:
            new_num_tokens: the new number of rows, positive.
            pad_to_multiple_of: round it up to a multiple of this.
        """
        if new_num_tokens < 1:
            raise ValueError(f"new_num_tokens must be positive; got {new_num_tokens}")
        if pad_to_multiple_of is not None:
            new_num_tokens = -(-new_num_tokens // pad_to_multiple_of) * pad_to_multiple_of
        if not isinstance(self.wte, nn.Embedding):
            raise TypeError(f"the token embedding is a {type(self.wte).__name__}: it has one size")
        old = self.wte.weight
        weight = resized_rows(old, new_num_tokens)
        self.wte = nn.Embedding.from_pretrained(weight, freeze=not old.requires_grad)
        self.config.vocab_size = new_num_tokens
        return self.wte


@torch.no_grad()
def resized_rows(weight: Tensor, rows: int) -> Tensor:
    """A copy of ``[V, C]`` with ``rows`` rows: cut off, or filled up with the mean of the old."""
    kept = min(len(weight), rows)
    resized = weight.float().mean(0).to(weight.dtype).repeat(rows, 1)
    resized[:kept] = weight[:kept]
    return resized


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that projections of hidden states of ``dtype`` come out in."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def _layer_head_masks(head_mask: Tensor, config: GPT2Config, device: torch.device) -> Tensor:
    """A ``[H]`` or ``[L, H]`` mask as ``[L, 1, H, 1, 1]``: each layer's multiplies its weights."""
    layers, heads = config.n_layer, config.n_head
    if head_mask.shape not in ((heads,), (layers, heads)):
        raise ValueError(
            f"head_mask must be [{heads}] or [{layers}, {heads}]; got {list(head_mask.shape)}"
        )
    return head_mask.to(device).expand(layers, heads).view(layers, 1, heads, 1, 1)


def _update_foreign(foreign: Any, present: KVCache, start: int) -> Any:
    """Append the new positions to a transformers Cache, which works by being changed."""
    for i, layer in enumerate(present):
        foreign.update(layer[0][:, :, start:], layer[1][:, :, start:], i)
    return foreign
