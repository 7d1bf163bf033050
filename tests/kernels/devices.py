"""Where the kernels are tested: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter computes bfloat16 wrongly.
TRITON_DTYPES = DTYPES if DEVICE == "cuda" else [torch.float32, torch.float16]

# Parametrise a test that takes the fixture `backend`; tensors it makes are on DEVICE.
backends = pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
backends_and_dtypes = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", dtype) for dtype in DTYPES] + [("triton", dtype) for dtype in TRITON_DTYPES],
    indirect=["backend"],
    ids=str,
)
triton_only = pytest.mark.parametrize("backend", ["triton"], indirect=True)
