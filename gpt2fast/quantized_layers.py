"""The modules that hold low-bit weights, output-major as `gpt2fast.kernels.packing` has them.

On a CPU a matrix is laid out for the op that multiplies it: at its first use, or with all others of
a model by `lay_out`, in less time. One of a block is then kept in that layout alone, and what the
state dict needs is unpacked from it; the head's rows stay beside their layout, and are laid out
again once they have changed.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from gpt2fast.kernels import packing, quantized


class Quantized(nn.Module):
    """A weight ``[N, K]`` in one of the forms of `gpt2fast.kernels.packing`.

    Attributes:
        bits: 16, 8 or 4.
        outputs, inputs: N and K.
        scale: None, float32 ``[N]`` or ``[N, ceil(K / 128)]``.
        packed: the weight in the layout of a CPU's op; None before the first call and elsewhere.
    """

    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.outputs, self.inputs = weight.shape[0], weight.shape[1] * (2 if bits == 4 else 1)
        self.packed: quantized.Packed | None = None
        self._buffers["weight"] = weight
        self.register_buffer("scale", scale)
        self.training = False

    @property
    def weight(self) -> Tensor:
        """float16 or int8 ``[N, K]``, or uint8 ``[N, K / 2]``."""
        held = self._buffers["weight"]
        if held is None:
            assert self.packed is not None
            return self.packed.weight()
        return held

    def train(self, mode: bool = True) -> "Quantized":
        """Refuses training.

        Raises:
            RuntimeError: ``mode`` is True.
        """
        if mode:
            raise RuntimeError(
                "a quantised model cannot be trained: its weights have no gradients. Train the "
                "float model and quantise the result"
            )
        super().train(False)
        return self

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}, inputs={self.inputs}, bits={self.bits}"

    def unpack(self) -> None:
        """Bring the weight back to the form that other devices, and the state dict, know."""
        self._buffers["weight"], self.packed = self.weight, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantized":
        """Moves. A cast is for the floating tensors around the form, not for the form itself."""
        if self.packed is not None and fn(torch.empty(0, device="cpu")).device.type != "cpu":
            self.unpack()
        form = {name: self._buffers.pop(name) for name in ("weight", "scale")}
        super()._apply(fn, recurse)
        for name, tensor in form.items():
            self._buffers[name] = None if tensor is None else _moved(fn, tensor)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which know no packed layouts."""
        return {
            **self.__dict__,
            "packed": None,
            "_buffers": {**self._buffers, "weight": self.weight},
        }

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        self.unpack()
        for name in ("weight", "scale"):
            given, held = state_dict.get(prefix + name), self._buffers[name]
            # PyTorch would cast floats to integers without a word.
            if given is not None and held is not None and given.dtype != held.dtype:
                errors = lists[-1]
                errors.append(
                    f"{prefix}{name} is {given.dtype}; this quantised model's is {held.dtype}"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)


class QuantizedEmbedding(Quantized):
    """Rows of a weight; they come out in the dtype that the model is cast to."""

    def __init__(self, weight: Tensor, scale: Tensor | None, bits: int, dtype: torch.dtype) -> None:
        super().__init__(weight, scale, bits)
        self.dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantized":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``[...]`` to ``[..., K]``."""
        rows = self.weight[ids]
        scale = None if self.scale is None else self.scale[ids]
        return packing.dequantize(rows, scale, self.bits).to(self.dtype)


class _Linear(Quantized):
    """``x W^T + b``."""

    bias: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor | None, bits: int, bias: Tensor | None
    ) -> None:
        super().__init__(weight, scale, bits)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``, in the dtype of x.

        Raises:
            RuntimeError: x needs a gradient.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"no gradient passes through a {type(self).__name__}: call the model under "
                "torch.no_grad(), or detach its inputs"
            )
        return self.rows(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.outputs)

    def rows(self, x: Tensor) -> Tensor:
        """The same for ``[M, K]``, without `forward`'s check."""
        packed = self.packed
        if packed is None and x.device.type == "cpu":
            packed = self._pack()
        if packed is None:
            product = quantized.plain_linear(x, self.weight, self.scale, self.bits)
            return product if self.bias is None else product.add_(self.bias)
        return packed(x.float()).to(x.dtype)

    def _pack(self) -> quantized.Packed | None:
        bias = None if self.bias is None else self.bias.float()
        self.packed = packed = quantized.pack(self.weight, self.scale, bias, self.bits)
        return packed


class QuantizedHead(_Linear):
    """The language-model head. Its rows stay beside their packed layout: the embedding reads them.

    They may so be written through the embedding, of which the packed layout knows nothing: it is
    compared with them at every call. Tensors made in inference mode do not tell of writes.

    Args:
        weight, scale, bits: as `Quantized` has them.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, bits: int) -> None:
        super().__init__(weight, scale, bits, None)

    def tie(self, embedding: QuantizedEmbedding) -> None:
        """Take the embedding's rows."""
        rows = embedding._buffers
        if self._buffers["weight"] is not rows["weight"]:
            self._buffers.update(weight=rows["weight"], scale=rows["scale"])
            self.packed = None

    def rows(self, x: Tensor) -> Tensor:
        packed = self.packed
        if packed is not None and not _same(packed.source, self._source()):
            self.packed = None
        return super().rows(x)

    def _pack(self) -> quantized.Packed | None:
        source = self._source()  # first, so that a write meanwhile is seen
        packed = super()._pack()
        if packed is not None:
            packed.source = source
        return packed

    def _source(self) -> tuple[tuple[Tensor, int], ...]:
        held = (self.weight, self.scale)
        return tuple((t, 0 if t.is_inference() else t._version) for t in held if t is not None)


class QuantizedConv1D(_Linear):
    """Stands in for `Conv1D`, with the weight output-major. Packed, it keeps no second copy."""

    def _pack(self) -> quantized.Packed | None:
        # Another thread may be between these lines: the one is set before the other goes.
        packed = super()._pack()
        if packed is not None:
            self._buffers["weight"] = None
        return packed


def lay_out(model: nn.Module) -> None:
    """Lay out the matrices of a model on a CPU, in as many threads as PyTorch uses.

    Those that are laid out already stay as they are.
    """
    waiting = [
        module
        for module in model.modules()
        if isinstance(module, _Linear) and module.packed is None and module.weight.is_cpu
    ]
    if not waiting:
        return
    waiting.pop(0)._pack()  # which times the ops, where that has not been done: undisturbed
    # From the end, for the head is the largest, and would keep one thread busy after the others.
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(waiting) or 1)) as pool:
        for _ in pool.map(lambda module: module._pack(), reversed(waiting)):
            pass  # but raise what was raised


def _same(first: tuple[tuple[Tensor, int], ...], second: tuple[tuple[Tensor, int], ...]) -> bool:
    return len(first) == len(second) and all(
        a is b and version == other for (a, version), (b, other) in zip(first, second, strict=True)
    )


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
