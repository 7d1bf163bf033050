"""The ops as PyTorch sees them: schemas, fake tensors, autograd, compilation and transforms."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2fast import kernels
from tests.kernels.devices import DEVICE, backends

torch.manual_seed(1)
C, H = 16, 2
QKV = torch.randn(2, 5, 3 * C)
PAST = torch.randn(2, 2, H, 3, C // H)
IDS = torch.randint(11, (2, 5))
LABELS = torch.randint(11, (10,))
WTE, WPE = torch.randn(11, C), torch.randn(13, C)
AFFINE = torch.randn(C), torch.randn(C)
FC = torch.randn(C, 4 * C) / 4, torch.randn(4 * C)
PROJ = torch.randn(4 * C, C) / 8, torch.randn(C)
X = torch.randn(2, 5, C)

# Differentiable ops: a public call as a function of its differentiable tensors.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "layer_norm": (kernels.layer_norm, (X, *AFFINE)),
    "add_layer_norm": (kernels.add_layer_norm, (X, X + 1, *AFFINE)),
    "linear": (kernels.linear, (X, *FC)),
    "gelu_mlp": (kernels.gelu_mlp, (X, *FC, *PROJ, X)),
    "embedding": (lambda *t: kernels.embedding(IDS, IDS[:1], IDS, *t), (WTE, WPE)),
    "embedding_layer_norm": (
        lambda *t: kernels.embedding_layer_norm(IDS, IDS[:1], IDS, *t),
        (WTE, WPE, *AFFINE),
    ),
    "causal_attention": (
        lambda qkv, past: kernels.causal_attention(qkv, H, past_kv=past),
        (QKV, PAST),
    ),
    "masked_attention": (
        lambda qkv: kernels.causal_attention(qkv, H, mask=torch.ones(2, 5).bool(), upcast=True),
        (QKV,),
    ),
    "weighted_attention": (
        lambda qkv, past: kernels.weighted_attention(qkv, H, past_kv=past),
        (QKV, PAST),
    ),
    "lm_head_loss": (lambda h, w: kernels.lm_head_loss(h, w, LABELS), (X.view(10, C), WTE)),
    "lm_head_losses": (
        lambda h, w: kernels.lm_head_loss(h, w, LABELS, reduction="none"),
        (X.view(10, C), WTE),
    ),
}

OPS: dict[str, tuple[Any, ...]] = {
    "layer_norm": (X, *AFFINE, 1e-5),
    "add_layer_norm": (X, X + 1, *AFFINE, 1e-5),
    "linear": (X, *FC),
    "gelu_mlp": (X, *FC, *PROJ, None),
    "embedding": (IDS, IDS[:1], None, WTE, WPE),
    "embedding_layer_norm": (IDS, IDS[:1], IDS, WTE, WPE, *AFFINE, 1e-5),
    "causal_attention": (QKV, H, PAST, None, None, None, 0.3, 0.0, False),
    "attention_append": (
        QKV,
        torch.zeros(2, 2, H, 8, C // H),
        3,
        None,
        H,
        None,
        None,
        None,
        0.3,
        False,
    ),
    "lm_head_loss": (X.view(10, C), WTE, LABELS, -100, "mean"),
}


def _sum(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A scalar in which every output counts differently."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return sum(((i + 1) * o.sin().sum() for i, o in enumerate(outputs)), torch.zeros(()))


def _grads(call: Callable[..., Any], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(_sum(call(*leaves)), leaves)


def _assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(name: str, needs_grad: bool) -> None:
    if name == "attention_append" and needs_grad:
        pytest.skip("this op takes no gradient")
    args = tuple(
        a.clone().requires_grad_(needs_grad and a.is_floating_point())
        if isinstance(a, Tensor)
        else a
        for a in OPS[name]
    )
    torch.library.opcheck(getattr(torch.ops.gpt2fast, name).default, args)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_as_one_graph(name: str) -> None:
    call, tensors = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    _assert_equal(compiled(*tensors), call(*tensors))
    _assert_equal(_grads(compiled, tensors), _grads(call, tensors))


def test_append_compiles_and_still_writes_the_cache() -> None:
    def call(qkv: Tensor, cache: Tensor) -> Tensor:
        return kernels.attention_append(qkv, cache, 2, H) + 1

    torch._dynamo.reset()
    caches = [torch.randn(2, 2, H, 9, C // H).repeat(1, 1, 1, 1, 1) for _ in range(2)]
    caches[1].copy_(caches[0])
    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        _assert_equal(compiled(QKV, caches[0]), call(QKV, caches[1]))
    assert torch.equal(caches[0], caches[1])


@pytest.mark.parametrize("name", [n for n in CALLS if not n.startswith("lm_head")])
def test_functional_gradient(name: str) -> None:
    """torch.func.grad, as used for per-sample gradients: every op but the loss, which says so."""
    call, tensors = CALLS[name]
    everything = tuple(range(len(tensors)))
    got = torch.func.grad(lambda *t: _sum(call(*t)), argnums=everything)(*tensors)
    _assert_equal(got, _grads(call, tensors))


def test_fused_attention_refuses_a_second_derivative() -> None:
    """PyTorch's fused attention has none; `weighted_attention` does."""
    leaf = QKV.clone().requires_grad_()
    out = kernels.causal_attention(leaf, H)
    (grad,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("name", [n for n in CALLS if n[:3] not in ("lm_", "cau", "mas")])
def test_second_derivative(name: str) -> None:
    """Against a central difference of the first, along a random direction."""
    call, tensors = CALLS[name]
    leaves = [t.double().requires_grad_() for t in tensors]
    first = torch.autograd.grad(_sum(call(*leaves)), leaves, create_graph=True)
    second = torch.autograd.grad(_sum(tuple(first)), leaves[0])[0]
    direction, step = torch.randn_like(leaves[0]), 1e-5

    def gradient_sum(shift: float) -> Tensor:
        moved = [(leaves[0] + shift * direction).detach(), *(t.detach() for t in leaves[1:])]
        return _sum(_grads(call, tuple(moved)))

    numeric = (gradient_sum(step) - gradient_sum(-step)) / (2 * step)
    torch.testing.assert_close((second * direction).sum(), numeric, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors(name: str) -> None:
    """Shapes and dtypes without data: what fake tensors and lazy initialisation rely on."""
    call, tensors = CALLS[name]
    expected = call(*tensors)

    def on_meta(*t: Tensor) -> Any:
        if name.startswith("embedding"):
            ids = IDS.to("meta")
            return getattr(kernels, name)(ids, ids[:1], ids, *t)
        if name.startswith("lm_head"):
            reduction = "mean" if name == "lm_head_loss" else "none"
            return kernels.lm_head_loss(*t, LABELS.to("meta"), reduction=reduction)
        if name == "masked_attention":
            mask = torch.ones(2, 5, device="meta").bool()
            return kernels.causal_attention(*t, H, mask=mask, upcast=True)
        return call(*t)

    got = on_meta(*(t.to("meta") for t in tensors))
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for meta, real in pairs:
        assert (meta.device.type, meta.shape, meta.dtype) == ("meta", real.shape, real.dtype)


class _Names(TorchDispatchMode):
    """The ops of ours that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gpt2fast":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


@backends
def test_modes_profilers_and_subclasses_see_the_ops(backend: str) -> None:
    affine = tuple(t.to(DEVICE) for t in AFFINE)
    x = X.to(DEVICE)

    def call(x: Tensor) -> Tensor:
        return kernels.layer_norm(x, *affine)

    seen: list[Any] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        expected = call(x)
        with _Names() as names:
            _assert_equal(call(x), expected)
        assert names.seen == ([] if backend == "torch" else ["layer_norm_fwd"])
        with Functions():
            _assert_equal(call(x), expected)
        assert torch.ops.gpt2fast.layer_norm.default in seen
        with torch.profiler.profile() as profile:
            _assert_equal(call(x), expected)
        assert "gpt2fast::layer_norm" in {event.name for event in profile.events()}
        assert type(call(x.as_subclass(_Subclass))) is _Subclass
        _assert_equal(torch.vmap(call)(x), expected)
        _assert_equal(call(x.to(torch.complex64).mul(1j).conj().imag), -expected + 2 * affine[1])


@backends
def test_a_call_past_the_dispatcher_is_the_same(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fixture sets a default device, for which calls go through the dispatcher.
    x, affine = X.to(DEVICE), tuple(t.to(DEVICE) for t in AFFINE)
    through = kernels.layer_norm(x, *affine)

    def refuse(*_: Any) -> None:
        raise AssertionError("the dispatcher was asked")

    with torch._C.DisableTorchFunction(), monkeypatch.context() as patch:
        patch.setattr(torch._C, "_len_torch_function_stack", lambda: 0)
        patch.setattr(torch._ops.OpOverload, "__call__", refuse)
        passed = [kernels.layer_norm(x, *affine)]
        with torch.inference_mode():
            passed.append(kernels.layer_norm(x.clone(), *affine))
    for y in passed:
        _assert_equal(y, through)
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", refuse)
    with pytest.raises(AssertionError, match="was asked"):
        kernels.layer_norm(x, *affine, eps=0)  # to be converted by the schema


def test_the_public_ops_are_exported_and_documented() -> None:
    for name in kernels.__all__:
        assert getattr(kernels, name).__doc__, name
    assert set(OPS) <= set(kernels.__all__)


def test_importing_touches_no_device_and_no_triton() -> None:
    code = (
        "import sys, torch; import gpt2fast.kernels;"
        "assert not torch.cuda.is_initialized();"
        "print([m for m in sys.modules if m.split('.')[0] in ('triton', 'transformers')])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[]"
