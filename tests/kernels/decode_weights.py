"""Random packed weights for the decode engine's tests, and what they stand for in float64."""

import torch
from torch import Tensor

from gpt2fast.config import GPT2Config
from gpt2fast.kernels.packing import (
    DecodeWeights,
    Matrix,
    dequantize,
    quantize_int4,
    quantize_int8,
)
from gpt2fast.model import GPT2LMHeadModel
from tests.kernels.devices import DEVICE


def random_matrix(
    layers: int, outputs: int, inputs: int, bits: int, dtype: torch.dtype, *, bias: bool = True
) -> Matrix:
    """Of realistic scale: products of normalised rows have a spread of about 1."""
    weights = torch.randn(layers, outputs, inputs) * inputs**-0.5
    biases = (torch.randn(layers, outputs) * 0.3).to(DEVICE, dtype) if bias else None
    if bits >= 16:
        return Matrix(weights.to(DEVICE, dtype), None, biases, bits)
    pairs = [(quantize_int8 if bits == 8 else quantize_int4)(weight) for weight in weights]
    data, scale = (torch.stack(part).to(DEVICE) for part in zip(*pairs, strict=True))
    return Matrix(data, scale, biases, bits)


def random_weights(
    bits: int, dtype: torch.dtype, *, width: int, inner: int, heads: int, vocab: int,
    positions: int, layers: int = 2,
) -> DecodeWeights:  # fmt: skip
    def norm(*shape: int) -> Tensor:
        both = (1 + 0.2 * torch.randn(*shape), 0.2 * torch.randn(*shape))
        return torch.stack(both, -2).to(DEVICE, dtype)

    return DecodeWeights(
        wte=torch.randn(vocab, width).to(DEVICE, dtype),
        wpe=(0.3 * torch.randn(positions, width)).to(DEVICE, dtype),
        ln_1=norm(layers, width),
        ln_2=norm(layers, width),
        ln_f=norm(width),
        qkv=random_matrix(layers, 3 * width, width, bits, dtype),
        out=random_matrix(layers, width, width, bits, dtype),
        fc=random_matrix(layers, inner, width, bits, dtype),
        proj=random_matrix(layers, width, inner, bits, dtype),
        head=random_matrix(1, vocab, width, bits, dtype, bias=False),
        heads=heads,
        eps=1e-5,
        scales=torch.full((layers,), (width // heads) ** -0.5, device=DEVICE),
    )


def exact(matrix: Matrix, layer: int = 0) -> tuple[Tensor, Tensor]:
    """Weights ``[K, N]`` and bias ``[N]`` (0 where there is none) in float64."""
    scale = None if matrix.scale is None else matrix.scale[layer]
    weight = dequantize(matrix.data[layer], scale, matrix.bits).double()
    bias = weight.new_zeros(weight.shape[0])
    return weight.t(), bias if matrix.bias is None else matrix.bias[layer].double()


def exact_model(weights: DecodeWeights) -> GPT2LMHeadModel:
    """The plain model, in float64, whose parameters the weights stand for."""
    layers = weights.qkv.data.shape[0]
    config = GPT2Config(
        vocab_size=weights.wte.shape[0],
        n_positions=weights.wpe.shape[0],
        n_embd=weights.wte.shape[1],
        n_inner=weights.fc.outputs,
        n_layer=layers,
        n_head=weights.heads,
        layer_norm_epsilon=weights.eps,
        tie_word_embeddings=False,
    )
    state = {
        "transformer.wte.weight": weights.wte,
        "transformer.wpe.weight": weights.wpe,
        "transformer.ln_f.weight": weights.ln_f[0],
        "transformer.ln_f.bias": weights.ln_f[1],
        "lm_head.weight": exact(weights.head)[0].t(),
    }
    for layer in range(layers):
        prefix = f"transformer.h.{layer}."
        for name, norm in (("ln_1", weights.ln_1), ("ln_2", weights.ln_2)):
            state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"] = norm[layer]
        for name, matrix in (
            ("attn.c_attn", weights.qkv),
            ("attn.c_proj", weights.out),
            ("mlp.c_fc", weights.fc),
            ("mlp.c_proj", weights.proj),
        ):
            state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"] = exact(matrix, layer)
    model = GPT2LMHeadModel(config).to(DEVICE).double().eval()
    model.load_state_dict({name: tensor.double() for name, tensor in state.items()})
    return model
