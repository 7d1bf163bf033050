"""How much of the machine a run uses: model FLOPs utilisation (MFU).

MFU is the arithmetic that the model needs, whatever else is computed, over what the devices can do
(Chowdhery et al. 2022, *PaLM*, appendix B). That is measured: the rate of a large matrix product in
the dtype of training, on all processes at once.
"""

import time

import torch

from gpt2fast.model import GPT2LMHeadModel

_SECONDS = 0.01


def flops_per_token(model: GPT2LMHeadModel, row_tokens: int, vocabulary: int) -> float:
    """FLOPs that a training step needs a token, in rows of ``row_tokens``.

    6 for every weight that a token is multiplied with, forward and backward, with ``vocabulary``
    rows in the head; and 6 * layers * width * row_tokens in attention, where a token sees half of
    its row on average.
    """
    config = model.config
    matrices = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() >= 2)
    weights = matrices + vocabulary * config.n_embd
    return 6.0 * (weights + config.n_layer * config.n_embd * row_tokens)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest product of two square matrices on ``device``.

    They grow until a product takes long enough to tell, so a slow device is not kept busy long.
    """
    best, size, seconds = 0.0, 128, 0.0
    while seconds < _SECONDS and size < 8192:
        size *= 2
        matrix = torch.full((size, size), 0.5, device=device, dtype=dtype)
        for _ in range(2):  # the first may load the library
            started = time.perf_counter()
            matrix @ matrix
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
            best = max(best, 2 * size**3 / seconds)
    return best
