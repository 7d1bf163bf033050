"""The modules that `gpt2fast.accelerate` puts in the place of transformers'.

Each is a subclass of the class it replaces, under the same name, without state of its own: a module
is changed by assigning its ``__class__``, and changed back the same way. Compared with replacing
``forward`` on the instance this survives pickling and deep copies (the class is found by name, and
no bound method drags the old object along), leaves parameters, buffers and hooks where they are,
keeps `isinstance` and class names as they were (PEFT, Trainer and ``save_pretrained`` go by them),
and is what ``torch.compile`` traces as ordinary modules.

Every module looks at those it would fuse with before it does: a hook, an adapter or another class
there, and it calls them one by one as transformers does.
"""

import functools
import inspect
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations, pytorch_utils
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.gpt2 import modeling_gpt2

from gpt2fast import kernels
from gpt2fast.integrations.attention import NAME, WEIGHTS, register
from gpt2fast.integrations.decoding import Generates
from gpt2fast.integrations.deferred import DeferredLogits
from gpt2fast.kernels.backend import serves
from gpt2fast.layers import drops, is_plain

_CAPTURING = "transformers.utils.output_capturing"  # whose hooks only collect outputs

# Whether the forward pass that runs has labels, whose loss needs no logits.
_LABELLED: ContextVar[bool] = ContextVar("labelled", default=False)

register()  # here, as a pickled model imports no more than its classes

# What a block is called with, by position. Older ones had others, and returned tuples of several
# kinds: those stay as they are, and so does the attention that they call.
_, _, _CACHE, *_OTHERS = list(inspect.signature(modeling_gpt2.GPT2Block.forward).parameters)
_KNOWN_BLOCKS = _CACHE in ("past_key_values", "cache") and _OTHERS[:2] == [
    "attention_mask",
    "encoder_hidden_states",
]
_MANY_LOGITS = 2**26  # 256 MB in float32

# "sdpa" gives way to "eager" where weights or a head mask are asked for.
_FALLS_BACK = "Falling back to" in inspect.getsource(modeling_gpt2.GPT2Attention.forward)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return kernels.layer_norm(input, self.weight, self.bias, self.eps)


class Conv1D(pytorch_utils.Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class NewGELUActivation(activations.NewGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


class FastGELUActivation(activations.FastGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


class GPT2MLP(modeling_gpt2.GPT2MLP):
    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``, with ``residual`` added where it is given."""
        if not (
            (is_plain(self.act, NewGELUActivation) or is_plain(self.act, FastGELUActivation))
            and is_plain(self.c_fc, Conv1D)
            and is_plain(self.c_proj, Conv1D)
        ):
            out = super().forward(hidden_states)
            return out if residual is None else residual + out
        dropped = drops(self.dropout)
        out = kernels.gelu_mlp(
            hidden_states,
            self.c_fc.weight,
            self.c_fc.bias,
            self.c_proj.weight,
            self.c_proj.bias,
            None if dropped else residual,
        )
        if not dropped:
            return out
        out = self.dropout(out)
        return out if residual is None else residual + out


class GPT2Attention(modeling_gpt2.GPT2Attention):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attends on the packed projection where there is no past, else as transformers does."""
        if _FALLS_BACK and self.config._attn_implementation == NAME:
            token = WEIGHTS.set(bool(kwargs.get("output_attentions")))
            try:
                return super().forward(hidden_states, *args, **kwargs)
            finally:
                WEIGHTS.reset(token)
        # By its class: between versions, the name differs.
        past = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        if args or not self._attends_packed(hidden_states, past, kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        qkv = self.c_attn(hidden_states)
        if past is not None:
            past.update(*kernels.packed_kv(qkv, self.num_heads).unbind(0), self.layer_idx)
        merged = kernels.causal_attention(
            qkv,
            self.num_heads,
            mask=kwargs.get("attention_mask"),
            scale=self.scaling,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
        )
        return self.resid_dropout(self.c_proj(merged)), None

    def _attends_packed(self, hidden_states: Tensor, past: Any, kwargs: dict[str, Any]) -> bool:
        mask = kwargs.get("attention_mask")
        return (
            _KNOWN_BLOCKS
            and self.config._attn_implementation == NAME
            and self.is_causal
            and getattr(self.config, "is_causal", True)
            and kwargs.get("is_causal") is None
            and kwargs.get("encoder_hidden_states") is None
            and (mask is None or mask.dim() == 2 or mask.shape[-2] == mask.shape[-1])
            and (
                past is None
                # What a cache returns lies closer together, which counts on a CPU.
                or (
                    (torch.is_grad_enabled() or serves(hidden_states.device))
                    and type(past) is DynamicCache
                    and not past.get_seq_length(self.layer_idx)
                )
            )
        )


class GPT2Block(modeling_gpt2.GPT2Block):
    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """``[B, T, C]`` to ``[B, T, C]``; the residual additions are part of other ops."""
        ln_2, mlp = self.ln_2, self.mlp
        cache = kwargs.pop("past_key_values", cache)
        if encoder_hidden_states is not None or not is_plain(ln_2, LayerNorm):
            return super().forward(
                hidden_states, cache, attention_mask, encoder_hidden_states, **kwargs
            )
        kwargs.pop("encoder_attention_mask", None)
        attended, _ = self.attn(
            self.ln_1(hidden_states),
            attention_mask=attention_mask,
            **{_CACHE: cache},
            **kwargs,
        )
        normed, hidden_states = kernels.add_layer_norm(
            attended, hidden_states, ln_2.weight, ln_2.bias, ln_2.eps
        )
        if is_plain(mlp, GPT2MLP):
            return mlp(normed, hidden_states)
        return hidden_states + mlp(normed)


class Linear(nn.Linear):
    """The language-model head, whose product waits where a loss is all that may be asked for."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and _LABELLED.get() and self._may_wait(input):
            return DeferredLogits.of(input, self.weight)
        return F.linear(input, self.weight, self.bias)

    def _may_wait(self, input: Tensor) -> bool:
        return (
            self.bias is None
            and is_plain(self, Linear)
            and not _has_any_global_hook()
            and type(input) is Tensor
            and type(self.weight) in (Tensor, nn.Parameter)
            and input.device == self.weight.device
            # An evaluation often reads its logits after all, which would compute them twice.
            and (
                torch.is_grad_enabled()
                or input.numel() // self.in_features * self.out_features > _MANY_LOGITS
            )
            and not torch.jit.is_tracing()
            # Transforms of torch.func do not see through the op of the loss.
            and not torch._C._functorch.peek_interpreter_stack()
        )


def _labelled(forward: Any) -> Any:
    """A model's forward pass that says so when it has labels."""

    @functools.wraps(forward)  # Trainer and PEFT read the signature
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        token = _LABELLED.set(True)
        try:
            return forward(self, *args, **kwargs)
        finally:
            _LABELLED.reset(token)

    return wrapped


class GPT2LMHeadModel(Generates, modeling_gpt2.GPT2LMHeadModel):
    forward = _labelled(modeling_gpt2.GPT2LMHeadModel.forward)


class GPT2DoubleHeadsModel(modeling_gpt2.GPT2DoubleHeadsModel):
    forward = _labelled(modeling_gpt2.GPT2DoubleHeadsModel.forward)


# What replaces what: of the heads, and within the transformer.
HEADS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_gpt2.GPT2LMHeadModel: GPT2LMHeadModel,
    modeling_gpt2.GPT2DoubleHeadsModel: GPT2DoubleHeadsModel,
}
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    pytorch_utils.Conv1D: Conv1D,
    activations.NewGELUActivation: NewGELUActivation,
    activations.FastGELUActivation: FastGELUActivation,
    modeling_gpt2.GPT2MLP: GPT2MLP,
    modeling_gpt2.GPT2Attention: GPT2Attention,
}
if _KNOWN_BLOCKS:
    LAYERS[modeling_gpt2.GPT2Block] = GPT2Block
ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {
    ours: theirs for theirs, ours in {**HEADS, **LAYERS, nn.Linear: Linear}.items()
}


def attends_as_usual(config: Any) -> bool:
    """Whether scores are scaled by ``1 / sqrt(D)`` and nothing else, and attend to one sequence."""
    return bool(
        config.scale_attn_weights
        and not config.scale_attn_by_inverse_layer_idx
        and not config.reorder_and_upcast_attn
        and not config.add_cross_attention
    )


_PLAIN: set[type[nn.Module]] = {
    *(GPT2LMHeadModel, Linear, modeling_gpt2.GPT2Model, modeling_gpt2.GPT2Block),
    *(nn.ModuleList, nn.Embedding, nn.Dropout),
    *LAYERS.values(),
    type(activations.ACT2FN["gelu_pytorch_tanh"]),
}


def is_untouched(model: nn.Module) -> bool:
    """Whether a model computes what it was built to: nothing hooked, adapted, replaced, dropped."""
    config: Any = model.config
    return (
        attends_as_usual(config)
        and not _overrides(model)
        and getattr(config, "is_causal", True)
        and not _has_any_global_hook()
        and all(_is_untouched(module, config) for module in model.modules())
    )


def _overrides(model: nn.Module) -> bool:
    """Whether a method was replaced in the object alone, as PEFT does to put its prompts in."""
    own = [(value, getattr(type(model), name, None)) for name, value in vars(model).items()]
    return any(
        callable(value) and method is not None and getattr(value, "__func__", None) is not method
        for value, method in own
    )


def _is_untouched(module: nn.Module, config: Any) -> bool:
    return (
        type(module) in _PLAIN
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and all(hook.__module__ == _CAPTURING for hook in module._forward_hooks.values())
        and not (isinstance(module, nn.Dropout) and drops(module))
        and not (isinstance(module, LayerNorm) and module.eps != config.layer_norm_epsilon)
        and not (isinstance(module, nn.Embedding) and module.max_norm is not None)
        and not (isinstance(module, GPT2Attention) and not _attends_as_built(module, config))
    )


def _attends_as_built(module: Any, config: Any) -> bool:
    return (
        module.is_causal
        and module.num_heads == config.n_head
        and getattr(module, "scaling", module.head_dim**-0.5) == module.head_dim**-0.5
        and not (module.training and module.attn_dropout.p > 0)
    )
