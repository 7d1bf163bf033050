"""Triton's interpreter without the work that it repeats."""

import inspect
from typing import Any

_installed = False


def quicken() -> None:
    """Let the interpreter prepare ``triton.language`` once a launch.

    It does so at every call of a device function: it looks through all of the language's names, to
    replace those that are replaced already, which takes longer than most device functions do.
    """
    global _installed
    from triton.runtime import interpreter

    if _installed or not hasattr(interpreter, "_LangPatchScope"):
        return
    _installed = True
    prepare = interpreter._patch_lang
    prepared: set[str] = set()  # names of modules, in the launch that is going on

    def prepare_once(function: Any) -> Any:
        modules = {
            value.__name__
            for value in function.__globals__.values()
            if inspect.ismodule(value) and value in (interpreter.tl, interpreter.tl.core)
        }
        if modules and modules <= prepared:
            return interpreter._LangPatchScope()
        launch = not prepared
        prepared.update(modules)
        scope = prepare(function)
        if launch:
            restore = scope.restore

            def restored() -> None:
                prepared.clear()
                restore()

            scope.restore = restored
        return scope

    interpreter._patch_lang = prepare_once
