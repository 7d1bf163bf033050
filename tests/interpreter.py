"""Triton's interpreter, made to prepare itself once a launch and to round to float8.

At every call of a device function the interpreter replaces the members of `triton.language` again,
which takes it longer than the function itself: a millisecond, for what the launch has done already.
Its rounding to float8 loses what carries into the exponent: 1.99 becomes 1.
"""

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
