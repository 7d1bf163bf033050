"""`accelerate` and `restore`: a GPT-2 model of transformers on this package's kernels, in place."""

import copy
from collections.abc import Iterator
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from gpt2fast.engine.kept import STAND_INS, release

_Module = TypeVar("_Module", bound=nn.Module)

_MINIMUM = (4, 50)
# What an accelerated model has besides its own attributes.
_ORIGINAL, _GENERATES = "_gpt2fast_original_config", "_gpt2fast_generates"


def accelerate(model: _Module, *, generate: bool = True) -> _Module:
    """Put the kernels into a GPT-2 model of transformers, in inference and in training.

    Replaced, in this object alone and without copying a weight: LayerNorm, alone and with the
    residual addition before it; the perceptron; the projections; attention, where the model uses
    "sdpa" and the configuration scales scores as usual (in "eager", which keeps every weight, and
    in other implementations it stays as it is); and the loss of the language-model head, which is
    computed without stored logits (without gradients, only where they are many). ``outputs.logits``
    is then computed when it is first looked at; after the head's weight has changed, looking is an
    error. The loss has no gradient with respect to them.

    Classes keep their names and `isinstance`; state dicts, hooks, adapters, caches, masks,
    checkpointing, saving, Trainer and ``torch.compile`` work as before. Modules that are hooked,
    wrapped or of other classes are called, not bypassed. While ``torch.compile`` traces, the loss
    is computed as transformers does. Replaced modules (resized embeddings, say) are taken in by
    calling this again.

    Args:
        model: any module of a ``transformers`` GPT-2 (4.50 or newer), with or without a head; or
            one that contains such, as PEFT's wrappers do.
        generate: let ``generate`` of a language model use the decode engine, for greedy and
            sampled tokens of an unhooked model in eval mode; greedy tokens are the same, sampled
            ones repeat under ``torch.manual_seed`` but are others than transformers would draw.
            Everything else runs transformers' own.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: it contains no GPT-2 of transformers; the version is too old.
        ImportError: transformers is not installed.
    """
    _check_version()
    from gpt2fast.integrations import attention, modules

    roots = list(_roots(model))
    if not roots:
        raise ValueError(
            "accelerate needs a GPT-2 model of transformers; "
            f"got {type(model).__module__}.{type(model).__qualname__}"
        )
    for root in roots:
        _set_classes(root, generate)
        if modules.attends_as_usual(root.config):
            _set_config(model, root, attention.NAME)
    return model


def restore(model: _Module) -> _Module:
    """Undo `accelerate`: classes and configuration are what they were; weights were never changed.

    Frees the memory of the engine that ``generate`` has used. A model that is not accelerated stays
    as it is.

    Args:
        model: as for `accelerate`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError, ImportError: as `accelerate`.
    """
    _check_version()
    from gpt2fast.integrations import modules

    roots = list(_roots(model))
    if not roots:
        raise ValueError(
            "restore needs a GPT-2 model of transformers; "
            f"got {type(model).__module__}.{type(model).__qualname__}"
        )
    for root in roots:
        release(root)
        STAND_INS.pop(root, None)
        for module in root.modules():
            original = modules.ORIGINALS.get(type(module))
            if original is not None:
                _set_class(module, original)
        vars(root).pop(_GENERATES, None)
        _reset_config(model, root)
    return model


def _check_version() -> None:
    import transformers

    version = transformers.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _MINIMUM:
        raise ValueError(f"accelerate needs transformers 4.50 or newer; got {version}")


def _roots(model: Any) -> Iterator[Any]:
    """The GPT-2 models of transformers in a module, heads before what they contain."""
    from transformers.models.gpt2 import modeling_gpt2

    if not isinstance(model, nn.Module):
        return
    if isinstance(model, modeling_gpt2.GPT2PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from _roots(child)


def _set_classes(root: Any, generate: bool) -> None:
    from transformers.models.gpt2 import modeling_gpt2

    from gpt2fast.integrations import modules

    head = modules.HEADS.get(type(root))
    if head is not None:
        _set_class(root, head)
    if isinstance(root, modules.GPT2LMHeadModel):
        setattr(root, _GENERATES, generate)
    lm_head = getattr(root, "lm_head", None)
    if type(lm_head) is nn.Linear:
        _set_class(lm_head, modules.Linear)
    for body in root.modules():
        if isinstance(body, modeling_gpt2.GPT2Model):
            for module in body.modules():
                layer = modules.LAYERS.get(type(module))
                if layer is not None:
                    _set_class(module, layer)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    # The hooks of a device map keep the forward pass that they have replaced.
    held = vars(module).get("_old_forward")
    if getattr(held, "__func__", None) is type(module).forward:
        vars(module)["_old_forward"] = MethodType(cls.forward, module)
    module.__class__ = cls


def _set_config(model: nn.Module, root: Any, name: str) -> None:
    """Have the model's attention, and it alone, name another implementation.

    In a copy of the configuration: other models may have been built from the same object.
    """
    original = root.config
    if original._attn_implementation != "sdpa":
        return
    if _ORIGINAL in vars(root):  # a copy already
        original._attn_implementation = name
        return
    config = copy.copy(original)
    config._attn_implementation = name
    _replace_config(model, original, config)
    setattr(root, _ORIGINAL, (original, dict(vars(config))))


def _reset_config(model: nn.Module, root: Any) -> None:
    held = vars(root).pop(_ORIGINAL, None)
    if held is None:
        return
    original, before = held
    config = root.config
    # What has been set in the meantime stays set; of the original, others may have set more.
    for name, value in vars(config).items():
        if name not in before or before[name] != value:
            vars(original)[name] = value
    _replace_config(model, config, original)


def _replace_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = new
