"""The linear layer and the GELU perceptron, forward and backward, as sequences of products.

Each is our kernel with its epilogue or cuBLAS with passes of PyTorch's, as
`configs.matmul_provider` says.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast.kernels._triton import configs
from gpt2fast.kernels._triton.matmul import matmul, matmul_gelu_grad


def _ours(role: str, rows: Tensor) -> bool:
    return configs.matmul_provider(role, rows.shape[0], rows.element_size()) == "triton"


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight + bias``: see `matmul`."""
    return matmul(x, weight, bias)[0]


def gelu_mlp_fwd(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    residual: Tensor | None,
    save_pre: bool,
) -> tuple[Tensor, Tensor]:
    """The perceptron on the rows of x, and ``x @ fc_weight + fc_bias``, empty unless ``save_pre``.

    Shapes, strides and dtypes as `matmul` takes them.
    """
    if _ours("fc", x):
        hidden, pre = matmul(x, fc_weight, fc_bias, activate=True, save_pre=save_pre)
    else:
        pre = torch.addmm(fc_bias, x, fc_weight)
        hidden = F.gelu(pre, approximate="tanh")
        pre = pre if save_pre else x.new_empty(0)
    if _ours("linear" if residual is None else "proj", hidden):
        return matmul(hidden, proj_weight, proj_bias, residual)[0], pre
    out = torch.addmm(proj_bias, hidden, proj_weight)
    return out if residual is None else residual + out, pre


def gelu_mlp_bwd(
    dout: Tensor,
    x: Tensor | None,
    pre: Tensor,
    fc_weight: Tensor,
    proj_weight: Tensor,
    need_x: bool,
    need_fc_weight: bool,
    need_fc_bias: bool,
    need_proj_weight: bool,
    need_proj_bias: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, fc_weight, fc_bias, proj_weight, proj_bias; empty where not needed.

    Args:
        dout: ``[M, C]`` with unit stride along C.
        x: as in forward; not read unless fc_weight's gradient is needed.
        pre: what forward gave; not read where only proj_bias' gradient is needed.
        fc_weight, proj_weight: as in forward.
    """
    dout = dout.to(pre.dtype)
    dx = dfc_weight = dfc_bias = dproj_weight = dproj_bias = None
    if need_x or need_fc_weight or need_fc_bias:
        dpre, hidden, sums = _gelu_grad(dout, proj_weight.t(), pre, need_proj_weight, need_fc_bias)
        if need_fc_bias:
            dfc_bias = sums.sum(0).to(pre.dtype)
        if need_fc_weight:
            assert x is not None
            dfc_weight = x.t() @ dpre
        if need_x:
            dx = dpre @ fc_weight.t()
    elif need_proj_weight:
        hidden = F.gelu(pre, approximate="tanh")
    if need_proj_weight:
        dproj_weight = hidden.t() @ dout
    if need_proj_bias:
        dproj_bias = dout.sum(0)
    grads = (dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias)
    return tuple(pre.new_empty(0) if grad is None else grad for grad in grads)


def _gelu_grad(
    dout: Tensor, weight: Tensor, pre: Tensor, save_gelu: bool, sum_rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `matmul_gelu_grad`, by whoever is faster."""
    if _ours("gelu_grad", dout):
        return matmul_gelu_grad(dout, weight, pre, save_gelu=save_gelu, sum_rows=sum_rows)
    dpre = torch.ops.aten.gelu_backward(dout @ weight, pre, approximate="tanh")
    return dpre, F.gelu(pre, approximate="tanh") if save_gelu else pre, dpre
