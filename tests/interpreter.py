"""Triton's interpreter, made to do things once, and to round to float8.

At every call of a device function the interpreter replaces the members of `triton.language` again,
which takes it longer than the function itself: a millisecond, for what the launch has done already.
It also describes every value's type and shape anew, and computes integers a second time in 64 bits
for a check of overflow that it leaves out where it is not debugging: half of its time. Its rounding
to float8 loses what carries into the exponent: 1.99 becomes 1.
"""

import dataclasses
import math
from typing import Any


def prepare_once_a_launch() -> None:
    """From now on; a second call changes nothing."""
    from triton.language import core
    from triton.runtime import interpreter

    if hasattr(interpreter, "_prepared"):
        return
    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced = {id(interpreter.tl), id(core)}
    prepared: set[int] = set()
    modules: dict[Any, set[int]] = {}

    def prepare_new(fn: Any) -> Any:
        if fn not in modules:
            modules[fn] = {id(value) for value in fn.__globals__.values()} & replaced
        if modules[fn] <= prepared:
            return None
        prepared.update(modules[fn])
        return prepare(fn)

    def launch_afresh(self: Any, *args: Any, **keywords: Any) -> None:
        prepared.clear()
        launch(self, *args, **keywords)

    interpreter._patch_lang = prepare_new
    interpreter.GridExecutor.__call__ = launch_afresh  # type: ignore[method-assign]
    interpreter._prepared = True  # type: ignore[attr-defined]
    _describe_once()


def _describe_once() -> None:
    """Keep what follows from a type's name and shape, and leave out what nobody looks at."""
    from triton import knobs
    from triton.language import core
    from triton.runtime import interpreter

    if not knobs.runtime.interpret:  # the compiler has the same classes
        return
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(
            options, sanitize_overflow=False
        )
    describe, numpy_type = core.block_type.__init__, interpreter._get_np_dtype
    blocks: dict[Any, dict[str, Any]] = {}
    numpy_types: dict[str, Any] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(core._unwrap_if_constexpr, shape))
        if key not in blocks:
            describe(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def kept_numpy_type(kind: Any) -> Any:
        if kind.name not in numpy_types:
            numpy_types[kind.name] = numpy_type(kind)
        return numpy_types[kind.name]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            sizes = [core.constexpr(size) for size in shape]
            shapes[shape] = core.tuple(sizes), core.constexpr(math.prod(shape))
        self.shape, self.numel = shapes[shape]

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
    interpreter._get_np_dtype = kept_numpy_type


def round_to_float8() -> None:
    """To the nearest from now on, NaN beyond the range; a second call changes nothing."""
    import numpy as np
    import torch
    from triton.language import float8e4nv
    from triton.runtime import interpreter

    if hasattr(interpreter, "_rounds_to_float8"):
        return
    convert = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if target != float8e4nv:
            return convert(values, source, target, mode)
        exact = torch.from_numpy(np.asarray(values).astype(np.float32))
        exact = exact.where(exact.abs() < 464, torch.nan)
        return exact.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = rounded
    interpreter._rounds_to_float8 = True  # type: ignore[attr-defined]
