"""The modules of a GPT-2 block, with the published checkpoints' names and layouts.

They call the ops of `gpt2fast.kernels`. Where somebody has put a hook on a module or replaced it
(adapters, probes), the block steps through the modules one by one instead of fusing across them.
"""

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gpt2fast import kernels
from gpt2fast.config import TANH_GELU, GPT2Config

Kind = TypeVar("Kind", bound=nn.Module)

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def is_plain(module: object, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether calling ``module`` would run exactly ``kind.forward``, so that it may be fused.

    Hooks for all modules count too, except while compiling.
    """
    if not torch.compiler.is_compiling() and _has_any_global_hook():
        return False
    return type(module) is kind and not (
        "forward" in module.__dict__  # replaced on the instance, as accelerate does
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def drops(dropout: nn.Module) -> bool:
    """Whether calling ``dropout`` may do anything. Its own mode counts: some train it alone."""
    return not is_plain(dropout, nn.Dropout) or (dropout.training and dropout.p > 0)


class Conv1D(nn.Module):
    """A linear layer with its weight stored ``[in, out]``, as GPT-2's checkpoints hold it."""

    def __init__(self, nf: int, nx: int) -> None:
        """``nf`` outputs, ``nx`` inputs; the model initialises the values."""
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.empty(nf))

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` on this package's op."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class LayerPass:
    """What one layer reads in one forward pass besides its input, and what it leaves behind.

    No dataclass, on purpose: FSDP rebuilds those when it casts a module's arguments, and what the
    layer leaves behind would be left in a copy.

    Attributes:
        mask: as the attention ops take it.
        past_kv: ``[2, B, H, P, D]`` for the differentiable path.
        buffer, start: cache to append to in place, and where; ``past_kv`` is then None.
        head_mask: multiplied with the attention weights.
        normed: the output of ``ln_1``, where it came with the embedding.
        keep_weights, keep_kv: whether to leave ``weights`` and ``kv`` behind.
        weights: ``[B, H, T, S]``.
        kv: ``[2, B, H, P + T, D]``.
    """

    def __init__(
        self,
        mask: Tensor | None = None,
        past_kv: Tensor | None = None,
        buffer: Tensor | None = None,
        start: int = 0,
        head_mask: Tensor | None = None,
        normed: Tensor | None = None,
        keep_weights: bool = False,
        keep_kv: bool = False,
    ) -> None:
        self.mask, self.past_kv, self.head_mask, self.normed = mask, past_kv, head_mask, normed
        self.buffer, self.start = buffer, start
        self.keep_weights, self.keep_kv = keep_weights, keep_kv
        self.weights: Tensor | None = None
        self.kv: Tensor | None = None


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer_idx: int) -> None:
        super().__init__()
        self.num_heads = config.n_head
        self.scaling = config.attention_scale(layer_idx)
        self.upcast = config.reorder_and_upcast_attn
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states: Tensor, layer_pass: LayerPass | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, C]`` to the attention's output ``[B, T, C]`` and its weights, where kept."""
        layer_pass = LayerPass() if layer_pass is None else layer_pass
        qkv = self.c_attn(hidden_states)
        if layer_pass.buffer is not None:
            merged = kernels.attention_append(
                qkv,
                layer_pass.buffer,
                layer_pass.start,
                self.num_heads,
                mask=layer_pass.mask,
                scale=self.scaling,
                upcast=self.upcast,
            )
        else:
            merged = self._attend(qkv, layer_pass)
        return self.resid_dropout(self.c_proj(merged)), layer_pass.weights

    def _attend(self, qkv: Tensor, layer_pass: LayerPass) -> Tensor:
        past_kv = layer_pass.past_kv
        dropout_p = self.attn_dropout.p if self.training else 0.0
        if layer_pass.keep_kv:
            layer_pass.kv = kernels.packed_kv(qkv, self.num_heads, past_kv)
        if layer_pass.keep_weights or layer_pass.head_mask is not None:
            merged, weights = kernels.weighted_attention(
                qkv,
                self.num_heads,
                past_kv=past_kv,
                mask=layer_pass.mask,
                scale=self.scaling,
                dropout_p=dropout_p,
                head_mask=layer_pass.head_mask,
                upcast=self.upcast,
            )
            layer_pass.weights = weights if layer_pass.keep_weights else None
            return merged
        return kernels.causal_attention(
            qkv,
            self.num_heads,
            past_kv=past_kv,
            mask=layer_pass.mask,
            scale=self.scaling,
            dropout_p=dropout_p,
            upcast=self.upcast,
        )


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.inner_size, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.inner_size)
        name = config.activation_function
        self.act = nn.GELU(approximate="tanh") if name in TANH_GELU else _ACTIVATIONS[name]()
        self.dropout = nn.Dropout(config.resid_pdrop)
        self._tanh_gelu = name in TANH_GELU

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``, with ``residual`` added where it is given."""
        if not (
            self._tanh_gelu
            and is_plain(self.c_fc, Conv1D)
            and is_plain(self.act, nn.GELU)
            and is_plain(self.c_proj, Conv1D)
        ):
            out = self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))
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


class GPT2Block(nn.Module):
    """Pre-norm block: ``x += attn(ln_1(x)); x += mlp(ln_2(x))``."""

    def __init__(self, config: GPT2Config, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer_idx)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, hidden_states: Tensor, layer_pass: LayerPass | None = None) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        normed = None if layer_pass is None else layer_pass.normed
        if normed is None:
            normed = self.ln_1(hidden_states)
        attended, _ = self.attn(normed, layer_pass)
        ln_2 = self.ln_2
        if is_plain(ln_2, LayerNorm):
            normed, hidden_states = kernels.add_layer_norm(
                attended, hidden_states, ln_2.weight, ln_2.bias, ln_2.eps
            )
        else:
            hidden_states = hidden_states + attended
            normed = ln_2(hidden_states)
        if is_plain(self.mlp, GPT2MLP):
            return self.mlp(normed, hidden_states)
        return hidden_states + self.mlp(normed)
