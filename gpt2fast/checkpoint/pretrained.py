"""`from_pretrained` and `save_pretrained`: a checkpoint into a model, and back."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gpt2fast.checkpoint.checks import (
    DTYPES,
    check_layers,
    check_tensors,
    listed,
    stored_mode,
)
from gpt2fast.checkpoint.names import merge_tied, rename_for
from gpt2fast.checkpoint.sources import Source, locate
from gpt2fast.checkpoint.weights import (
    CONFIG_FILE,
    WEIGHT_FILES,
    CheckpointError,
    read_json,
    read_tensors,
    write_tensors,
)
from gpt2fast.config import GPT2Config
from gpt2fast.files import replacing
from gpt2fast.quantization import (
    CONFIG_FIELD,
    is_form,
    is_quantized,
    make_room,
    quantize_tensors,
    stored_tensors,
)

if TYPE_CHECKING:
    from gpt2fast.base import PreTrainedModel

_Model = TypeVar("_Model", bound="PreTrainedModel")

# Keywords of transformers' from_pretrained that change nothing here: memory is low anyway,
# pickles always restricted, no code of a repository is ever run, one attention serves all cases.
_WITHOUT_EFFECT = {
    "attn_implementation",
    "low_cpu_mem_usage",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
}
# More of them, which say something only where they are set; scripts pass them unset.
_UNSET_ONLY = {
    "from_flax",
    "from_tf",
    "ignore_mismatched_sizes",
    "offload_folder",
    "offload_state_dict",
    "proxies",
    "quantization_config",
    "resume_download",
    "variant",
}
# Fields that a configuration may have, though by default it does not.
_OPTIONAL_FIELDS = {"num_labels", "output_attentions", "output_hidden_states", "return_dict"}
_AUTO_DEVICES = {"auto", "balanced", "balanced_low_0", "sequential"}


def from_pretrained(
    cls: type[_Model],
    name_or_path: str | os.PathLike[str] | None,
    *,
    config: GPT2Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | torch.device | Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    output_loading_info: bool = False,
    quantize: str | None = None,
    **overrides: Any,
) -> Any:
    """Build a model and load a checkpoint into it; the model is in evaluation mode.

    Weights in safetensors are mapped from their file, not copied, unless another dtype or device
    is asked for: memory is taken as they are read. Training changes private copies of the mapped
    pages, never the file. Do not overwrite such a file in place while the model lives: replace it
    by renaming, as ``save_pretrained`` does.

    Parameters that the checkpoint lacks are initialised as a new model's; they are named in a
    warning, as is what the checkpoint holds and the model has no place for.

    Args:
        cls: the model's class.
        name_or_path: "bundled" (the small model inside this package), a folder, a file of weights
            or a pytorch-pretrained-BERT archive, or a repository of the Hub such as "gpt2". A
            folder is searched for ``model.safetensors``, its sharded form, ``pytorch_model.bin``
            and its sharded form, in this order. None where ``config`` and ``state_dict`` are given.
        config: instead of the checkpoint's: a GPT2Config (transformers' will do), its fields, or
            the path of a JSON file.
        dtype: a floating dtype or its name. None or "auto": the one that the configuration
            states, else that of the first tensor, as in transformers. ``torch_dtype`` is its old
            name.
        device: where to put the weights; None for the CPU. ``device_map`` is accepted if it names
            a single device; "auto" is the first GPU where there is one.
        revision: branch, tag or commit of a Hub repository; None for "main".
        token: a Hub token; None or True for the stored one, False for none.
        cache_dir: the Hub cache to use; None for the usual one.
        local_files_only: use the cache alone, as the environment's HF_HUB_OFFLINE=1 does.
        force_download: download even what is cached.
        subfolder: of the folder or repository.
        state_dict: tensors to load instead of the checkpoint's; they are copied.
        output_loading_info: also return a dict with the sets "missing_keys" (freshly initialised)
            and "unexpected_keys" (not used).
        quantize: "int8", "fp16" or "int4": as `gpt2fast.quantize` does, a matrix at a time as it is
            read. None for the checkpoint's own form, which may be one of these.
        **overrides: fields of the configuration to change.

    Returns:
        The model, or with ``output_loading_info`` the pair (model, info).

    Raises:
        CheckpointError: a ValueError: the contents are damaged, or do not fit the model.
        FileNotFoundError: the checkpoint or one of its files is nowhere to be found.
        PermissionError: a gated repository.
        ConnectionError: a download failed.
        TypeError: a keyword is neither an argument nor a field of the configuration.
    """
    for key in [*overrides]:
        if key in _WITHOUT_EFFECT or (key in _UNSET_ONLY and not overrides[key]):
            del overrides[key]
    if name_or_path is None:
        if config is None or state_dict is None:
            raise ValueError("without name_or_path, both config and state_dict must be given")
        config = _build_config(config, None, overrides)
        tensors, source = dict(state_dict), "state_dict"
    else:
        found = locate(
            name_or_path,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        config = _build_config(config, found, overrides)
        tensors = _read(found) if state_dict is None else dict(state_dict)
        source = str(name_or_path)
    model, missing, unexpected = _load(
        cls,
        config,
        tensors,
        dtype=_resolve_dtype(dtype if dtype is not None else torch_dtype, config, tensors),
        device=_resolve_device(device, device_map),
        quantize=quantize,
        copy=state_dict is not None,
    )
    if missing:
        _warn(f"{cls.__name__}: not in {source}, so newly initialised: {listed(missing)}")
    if unexpected:
        _warn(f"{cls.__name__}: in {source}, but not used: {listed(unexpected)}")
    if not output_loading_info:
        return model
    return model, {
        "missing_keys": missing,
        "unexpected_keys": unexpected,
        "mismatched_keys": set(),
        "error_msgs": [],
    }


def save_pretrained(
    model: "PreTrainedModel",
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    safe_serialization: bool = True,
    save_function: Any = None,
    storage_dtype: torch.dtype | None = None,
) -> None:
    """Write ``config.json`` and the weights as safetensors, as transformers reads them.

    A tied head is written once, as the embedding. A quantised model is written in its form, with a
    ``quantization_config`` that says so; transformers refuses it. Every file is replaced whole, so
    neither a kill nor a model that maps the old file (this one, perhaps) is harmed.

    Args:
        model: the model.
        folder: where to write; made if need be.
        max_shard_size: split the weights into files of at most so many bytes, or a text such as
            "200MB"; None for one file.
        is_main_process: False writes nothing, for all processes but one of a distributed run.
        state_dict: tensors to write instead of the model's, such as those gathered from its shards.
        safe_serialization: must be True.
        save_function: accepted without effect.
        storage_dtype: of the weights on disk; the configuration goes on naming the model's own,
            in which loading gives them back. None for the model's.

    Raises:
        ValueError: ``safe_serialization`` is False; ``state_dict`` lacks a parameter.
    """
    if not safe_serialization:
        raise ValueError("safe_serialization=False: only safetensors are written")
    if not is_main_process:
        return
    tensors = stored_tensors(model)
    if state_dict is not None:
        given = rename_for(model, state_dict)
        merge_tied(model, given)
        if missing := tensors.keys() - given.keys():
            raise ValueError(f"state_dict lacks {listed(missing)}")
        tensors = {name: given[name] for name in tensors}
    if storage_dtype is not None:
        tensors = {
            name: tensor if is_form(model, name) else tensor.to(storage_dtype)
            for name, tensor in tensors.items()
        }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder, max_shard_size)
    fields = {
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    fields.pop("torch_dtype", None)
    if not is_quantized(model):  # its configuration may be a quantised one's all the same
        fields.pop(CONFIG_FIELD, None)
    with replacing(folder / CONFIG_FILE) as file:
        file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _build_config(config: Any, source: Source | None, overrides: Mapping[str, Any]) -> GPT2Config:
    """The configuration given, in any of its forms, or else the source's, with the overrides."""
    if config is None and source is not None and (config := source.get(CONFIG_FILE)) is None:
        raise source.missing(CONFIG_FILE)
    cls = type(config) if isinstance(config, GPT2Config) else GPT2Config
    origin = "config"
    if hasattr(config, "to_dict"):  # transformers' too
        fields = config.to_dict()
    elif isinstance(config, Mapping):
        fields = dict(config)
    else:
        fields, origin = read_json(Path(config)), str(config)
    # A field must not take the place of a method.
    if taken := {key for key in fields if key != "model_type" and hasattr(cls, key)}:
        raise CheckpointError(f"{origin}: {sorted(taken)[0]!r} is not a field of a configuration")
    try:
        built = cls.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{origin}: {error}") from error
    for key in overrides:
        if key not in _OPTIONAL_FIELDS and not hasattr(built, key):
            raise TypeError(f"{key!r} is neither an argument nor a field of the configuration")
    return cls.from_dict({**built.to_dict(), **overrides}) if overrides else built


def _read(source: Source) -> dict[str, Tensor]:
    for name in WEIGHT_FILES:
        if (path := source.get(name)) is not None:
            return read_tensors(path, source.get)
    raise source.missing(" or ".join(WEIGHT_FILES))


def _load(
    cls: type[_Model],
    config: GPT2Config,
    tensors: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None,
    copy: bool,
) -> tuple[_Model, set[str], set[str]]:
    """The model with the tensors in it, and the names of what was missing and left over."""
    check_layers(config, tensors)
    stored = stored_mode(config, quantize)
    try:
        with torch.device("meta"):
            model = cls(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        # On the meta device nothing is allocated, but sizes past 64 bits do not even exist.
        raise CheckpointError(f"the configuration's sizes are impossible: {error}") from error
    if stored is not None:
        try:
            make_room(model, stored, dtype)
        except ValueError as error:
            raise CheckpointError(f"config: {error}") from error
    expected = stored_tensors(model)
    found = rename_for(model, tensors)
    merge_tied(model, found)
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    weights = {name: found[name] for name in expected if name in found}
    check_tensors(model, expected, weights)
    absent = sum(expected[name].numel() for name in missing)
    if absent > (present := sum(tensor.numel() for tensor in weights.values())):
        raise CheckpointError(
            f"the checkpoint holds {present} of the parameters of a {cls.__name__} and lacks "
            f"{absent}, among them {listed(missing)}: it is not one of this model"
        )
    for name in missing:
        if is_form(model, name):
            raise CheckpointError(f"the checkpoint lacks {name} of a quantised model")
        weights[name] = torch.empty(expected[name].shape, dtype=dtype)
        model._init_parameter(name, weights[name])
    if quantize is not None and stored is None:
        found.clear()
        tensors.clear()  # so that each float matrix goes when its form is there
        quantize_tensors(model, weights, quantize)
        make_room(model, quantize, dtype)
    for name, tensor in weights.items():
        cast = tensor.dtype if is_form(model, name) else dtype
        weights[name] = tensor.to(device, cast, copy=copy).contiguous()
    nn.Module.load_state_dict(model, weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval(), missing, unexpected


def _resolve_dtype(
    dtype: str | torch.dtype | None, config: GPT2Config, tensors: Mapping[str, Tensor]
) -> torch.dtype:
    if dtype not in (None, "auto"):
        return _as_dtype(dtype, "dtype", ValueError)
    stated = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if stated is not None:
        return _as_dtype(stated, "the configuration's dtype", CheckpointError)
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.dtype in DTYPES.values()]
    return dtypes[0] if dtypes else torch.get_default_dtype()


def _as_dtype(value: object, what: str, error: type[ValueError]) -> torch.dtype:
    dtype = DTYPES.get(str(value).removeprefix("torch."))
    if dtype is None:
        raise error(f"{what} must be one of {', '.join(DTYPES)}; got {value!r}")
    return dtype


def _resolve_device(device: str | torch.device | None, device_map: Any) -> torch.device:
    if device is None and isinstance(device_map, Mapping):
        devices = set(device_map.values())
        if len(devices) != 1:
            raise ValueError(f"device_map must name a single device; got {dict(device_map)}")
        (device_map,) = devices
    if device is None and device_map in _AUTO_DEVICES:
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = device_map if device is None else device
    return torch.device("cpu" if chosen is None else chosen)


def _warn(message: str) -> None:
    # From here over from_pretrained and the model's method of that name to its caller.
    warnings.warn(message, UserWarning, stacklevel=4)
