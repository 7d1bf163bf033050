"""Who generates in the ladder besides us: transformers in its settings, and a hand-written loop.

Everybody takes prompts ``[B, T]`` and a number n, and gives the n tokens that greedy decoding finds
behind each, ``[B, n]``. No token ends a row.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpt2fast
from bench.suite.measure import captured

Generate = Callable[[Tensor, int], Tensor]

_GRANULE = 64  # the static cache's length is a multiple of it


def transformers_model(model: Any, activation: str, attention: str = "sdpa") -> Any:
    """transformers' model with the same weights, dtype and device; on its fastest attention where
    nothing else is asked for."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    fields = {
        **model.config.to_dict(),
        "activation_function": activation,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    del fields["model_type"]
    config = transformers.GPT2Config(**fields, attn_implementation=attention)
    with model.device:
        theirs = transformers.GPT2LMHeadModel(config).to(model.dtype).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    return theirs


def transformers_generate(theirs: Any, static: bool) -> Generate:
    """Its ``generate``; with a static cache it compiles its forward pass on a GPU by itself."""
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}

    def generate(ids: Tensor, new_tokens: int) -> Tensor:
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            **options,
        )
        new: Tensor = out[:, ids.shape[1] :]
        return new

    return generate


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Not F.linear's bias: of a product alone Inductor makes the kernel that streams weights.
    return F.linear(x, weight) + bias


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _attend(q: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    # Written out, so that Inductor generates it: its calls of attention kernels are slower here.
    scores = (q @ key.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.to(value.dtype) @ value


def _block(
    hidden: Tensor,
    normed: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """One block from behind its first LayerNorm to behind the next block's, so that all that can be
    fused lies within: hidden, normed ``[B, C]``; key, value ``[B, H, S, D]``."""
    qkv_w, qkv_b, out_w, out_b, ln_w, ln_b, fc_w, fc_b, proj_w, proj_b, next_w, next_b = weights
    batch, heads, _, size = key.shape
    q, k, v = _linear(normed, qkv_w, qkv_b).view(batch, 3, heads, 1, size).unbind(1)
    key.index_copy_(2, position, k)
    value.index_copy_(2, position, v)
    merged = _attend(q, key, value, mask).view(batch, -1)
    hidden = hidden + _linear(merged, out_w, out_b)
    normed = _norm(hidden, ln_w, ln_b, eps)
    inner = F.gelu(_linear(normed, fc_w, fc_b), approximate="tanh")
    hidden = hidden + _linear(inner, proj_w, proj_b)
    return hidden, _norm(hidden, next_w, next_b, eps)


def _first(
    tokens: Tensor, position: Tensor, wte: Tensor, wpe: Tensor, weights: list[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    hidden = F.embedding(tokens, wte) + F.embedding(position, wpe)
    return hidden, _norm(hidden, *weights, eps)


def _choose(normed: Tensor, head: Tensor) -> Tensor:
    return F.linear(normed, head).argmax(-1)


class CompiledLoop:
    """What somebody writes who knows PyTorch well: weights output-major, a static cache, a block
    that is compiled once and serves all layers, and a CUDA graph for a whole token.

    Args:
        model: a `gpt2fast.GPT2LMHeadModel`, whose weights are copied.
        batch, context: how many rows, and how many positions they need.
        dry_run: compile nothing, and call the step instead of replaying it.
    """

    @torch.no_grad()
    def __init__(self, model: Any, batch: int, context: int, dry_run: bool) -> None:
        body, config = model.transformer, model.config
        self._body, self._eps, self._dry_run = body, config.layer_norm_epsilon, dry_run
        self._wte, self._wpe, self._head = body.wte.weight, body.wpe.weight, model.lm_head.weight
        norms = [(block.ln_1.weight, block.ln_1.bias) for block in body.h]
        norms.append((body.ln_f.weight, body.ln_f.bias))
        self._first_norm = list(norms[0])
        self._layers = [
            [
                *_output_major(block.attn.c_attn),
                *_output_major(block.attn.c_proj),
                *(block.ln_2.weight, block.ln_2.bias),
                *_output_major(block.mlp.c_fc),
                *_output_major(block.mlp.c_proj),
                *following,
            ]
            for block, following in zip(body.h, norms[1:], strict=True)
        ]
        self._capacity = -(-context // _GRANULE) * _GRANULE
        shape = (batch, config.n_head, self._capacity, config.head_size)
        options = {"dtype": model.dtype, "device": model.device}
        self._cache = [[torch.zeros(shape, **options) for _ in range(2)] for _ in body.h]
        whole = {"dtype": torch.int64, "device": model.device}
        self._tokens = torch.zeros(batch, **whole)
        self._position = torch.zeros(1, **whole)
        self._places = torch.arange(self._capacity, device=model.device)
        self._chosen = torch.zeros(batch, self._capacity + 1, **whole)
        compiled: Callable[[Any], Any] = lambda function: function  # noqa: E731
        if not dry_run:
            tuned = {"coordinate_descent_tuning": True}
            compiled = torch.compile(fullgraph=True, dynamic=False, options=tuned)
        self._calls = [compiled(function) for function in (_first, _block, _choose)]
        self._replay = self._captured()

    def _captured(self) -> Callable[[], None]:
        for _ in range(3):  # compiled, and warm
            self._position.zero_()
            self._step()
        self._graph, _ = captured(self._step)
        replay: Callable[[], None] = self._step if self._dry_run else self._graph.replay
        return replay

    def _step(self) -> None:
        """Evaluate the newest token of every row, choose the next."""
        first, block, choose = self._calls
        mask = self._places <= self._position
        hidden, normed = first(
            self._tokens, self._position, self._wte, self._wpe, self._first_norm, self._eps
        )
        for weights, (key, value) in zip(self._layers, self._cache, strict=True):
            hidden, normed = block(
                hidden, normed, key, value, self._position, mask, weights, self._eps
            )
        self._tokens.copy_(choose(normed, self._head))
        self._position += 1
        self._chosen.index_copy_(1, self._position, self._tokens[:, None])

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> None:
        """Evaluate the prompts and choose the first token behind each."""
        length = ids.shape[1]
        out = self._body(ids, use_cache=True)
        for (key, value), past in zip(self._cache, out.past_key_values, strict=True):
            key[:, :, :length], value[:, :, :length] = past[0], past[1]
        self._tokens.copy_(_choose(out.last_hidden_state[:, -1], self._head))
        self._position.fill_(length)
        self._chosen[:, length] = self._tokens

    @torch.no_grad()
    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self._replay()

    def generate(self, ids: Tensor, new_tokens: int) -> Tensor:
        length = ids.shape[1]
        self.prefill(ids)
        self.advance(new_tokens - 1)
        return self._chosen[:, length : length + new_tokens].clone()


def _output_major(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.weight.t().contiguous(), layer.bias.detach()


def our_generate(model: Any) -> Generate:
    """The public call."""

    def generate(ids: Tensor, new_tokens: int) -> Tensor:
        out = model.generate(ids, max_new_tokens=new_tokens, eos_token_id=[], do_sample=False)
        new: Tensor = out[:, ids.shape[1] :]
        return new

    return generate


def random_model(name: str, sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> Any:
    """A model of a preset's size, or of ``sizes``, whose random weights make each next token depend
    on all before it: matrices that keep a row's scale, biases that do not drown it, and embeddings
    so small that, with the tied head, a token does not predict itself."""
    config = gpt2fast.GPT2Config(**sizes) if sizes else gpt2fast.GPT2Config.preset(name)
    with device:
        model = gpt2fast.GPT2LMHeadModel(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.05)
                elif ".ln_" in name:
                    parameter.uniform_(0.5, 1.5)
                elif "wpe" in name or "wte" in name:
                    parameter.normal_(0, 0.02)
                else:
                    parameter.normal_(0, config.n_embd**-0.5)
    return model.to(dtype).eval()
