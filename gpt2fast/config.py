"""GPT2Config: the published fields of GPT-2's configuration, checked."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

# Fields and defaults of the published configuration files.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
    "summary_first_dropout": 0.1,
    "scale_attn_weights": True,
    "use_cache": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": None,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "tie_word_embeddings": True,
}

_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

PRESETS: dict[str, dict[str, int]] = {
    "distilgpt2": {"n_layer": 6},
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
ACTIVATIONS = (*TANH_GELU, "gelu", "relu", "silu", "swish", "tanh", "sigmoid")
SUMMARY_ACTIVATIONS = (None, "tanh")
SUMMARY_TYPES = ("last", "first", "mean", "cls_index")

_LOCATION = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "subfolder",
)
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_PROBABILITIES = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout")
_FLAGS = tuple(name for name, value in _DEFAULTS.items() if isinstance(value, bool))


class GPT2Config:
    """Configuration of a GPT-2 model.

    Args:
        vocab_size: rows of the token embedding.
        n_positions: longest context, in tokens.
        n_embd: width of the hidden states; a multiple of ``n_head``.
        n_layer: number of blocks.
        n_head: number of attention heads.
        n_inner: width inside the perceptron; None means ``4 * n_embd``.
        activation_function: one of `ACTIVATIONS`; "gelu_new" is the tanh form that GPT-2 uses.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout probabilities in training.
        layer_norm_epsilon: added to the variance in every LayerNorm.
        initializer_range: standard deviation of freshly initialised weights.
        summary_type, summary_use_proj, summary_activation, summary_proj_to_labels,
            summary_first_dropout: the multiple-choice head.
        scale_attn_weights: divide attention scores by ``sqrt(head size)``.
        scale_attn_by_inverse_layer_idx: also divide them by ``layer index + 1``.
        reorder_and_upcast_attn: compute scores and softmax in float32.
        use_cache: whether a forward pass returns the past by default.
        bos_token_id, eos_token_id, pad_token_id: ids of special tokens, or None.
        tie_word_embeddings: whether the head shares the token embedding's weight.
        **extra: kept as attributes and written back by `to_dict`; ``hidden_size``,
            ``num_hidden_layers``, ``num_attention_heads`` and ``max_position_embeddings`` are
            accepted as other names of the fields above.

    Raises:
        ValueError: a size is impossible or a value is unknown.
    """

    model_type = "gpt2"

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None
    activation_function: str
    resid_pdrop: float
    embd_pdrop: float
    attn_pdrop: float
    layer_norm_epsilon: float
    initializer_range: float
    summary_type: str
    summary_use_proj: bool
    summary_activation: str | None
    summary_proj_to_labels: bool
    summary_first_dropout: float
    scale_attn_weights: bool
    use_cache: bool
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    scale_attn_by_inverse_layer_idx: bool
    reorder_and_upcast_attn: bool
    tie_word_embeddings: bool

    def __init__(self, vocab_size: int = 50257, **fields: Any) -> None:
        fields["vocab_size"] = vocab_size
        for alias, name in _ALIASES.items():
            if alias in fields:
                if name in fields and fields[name] != fields[alias]:
                    raise ValueError(f"{alias}={fields[alias]} contradicts {name}={fields[name]}")
                fields[name] = fields.pop(alias)
        fields.pop("model_type", None)
        for name, value in {**_DEFAULTS, **fields}.items():
            if hasattr(type(self), name):
                raise ValueError(f"{name!r} cannot be a field: GPT2Config needs the name")
            setattr(self, name, value)
        self._validate()

    def _validate(self) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES}
        if self.n_inner is not None:
            sizes["n_inner"] = self.n_inner
        for name, size in sizes.items():
            if not _is_int(size) or size < 1:
                raise ValueError(f"{name} must be a positive integer; got {size!r}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head; got n_embd={self.n_embd}, "
                f"n_head={self.n_head}"
            )
        for name in _PROBABILITIES:
            p = getattr(self, name)
            if not _is_number(p) or not 0 <= p <= 1:
                raise ValueError(f"{name} must be a probability between 0 and 1; got {p!r}")
        eps = self.layer_norm_epsilon
        if not _is_number(eps) or not 0 < eps < 1:
            raise ValueError(f"layer_norm_epsilon must be between 0 and 1; got {eps!r}")
        std = self.initializer_range
        if not _is_number(std) or not 0 <= std < float("inf"):
            raise ValueError(f"initializer_range must be at least 0; got {std!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; got {getattr(self, name)!r}")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function must be one of {', '.join(ACTIVATIONS)}; "
                f"got {self.activation_function!r}"
            )
        if self.summary_type not in SUMMARY_TYPES:
            raise ValueError(
                f"summary_type must be one of {', '.join(SUMMARY_TYPES)}; got {self.summary_type!r}"
            )
        if self.summary_activation not in SUMMARY_ACTIVATIONS:
            raise ValueError(
                f"summary_activation must be 'tanh' or None; got {self.summary_activation!r}"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            for token_id in ids if isinstance(ids, list) else [ids]:
                if token_id is not None and not _is_int(token_id):
                    raise ValueError(f"{name} must be an integer or None; got {token_id!r}")
        if getattr(self, "add_cross_attention", False):
            raise ValueError("add_cross_attention=True is not supported: no GPT-2 was published so")

    def __getattr__(self, name: str) -> Any:
        if name in _ALIASES:
            return getattr(self, _ALIASES[name])
        raise AttributeError(f"GPT2Config has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_ALIASES.get(name, name), value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GPT2Config) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"GPT2Config {self.to_json_string()}"

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "GPT2Config":
        """The configuration of a published model, by name.

        Raises:
            ValueError: the name is not in `PRESETS`.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], **overrides: Any) -> "GPT2Config":
        """Build from the contents of a ``config.json``, of either generation.

        Raises:
            ValueError: it is not a mapping, or describes another kind of model.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"a configuration must be a mapping; got {type(fields).__name__}")
        model_type = fields.get("model_type", "gpt2")
        if model_type != "gpt2":
            raise ValueError(f"expected a configuration of model_type 'gpt2'; got {model_type!r}")
        return cls(**{**fields, **overrides})

    @classmethod
    def from_json_file(cls, path: str | Path, **overrides: Any) -> "GPT2Config":
        """Read a ``config.json``.

        Raises:
            ValueError: the file is not JSON, or not GPT-2's.
            OSError: the file cannot be read.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a JSON configuration: {error}") from error
        return cls.from_dict(fields, **overrides)

    @classmethod
    def from_pretrained(cls, name_or_path: str | PathLike[str], **options: Any) -> "GPT2Config":
        """The configuration of a checkpoint, without its weights.

        Args:
            name_or_path: "bundled", a folder, a file of weights or a repository of the Hub, as for
                the models.
            **options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``,
                ``force_download`` and ``subfolder``, as for the models; others are fields to
                change.

        Raises:
            ValueError, OSError: as `from_json_file`; FileNotFoundError where there is none.
        """
        from gpt2fast.checkpoint.sources import locate  # which loads torch

        where = {name: options.pop(name) for name in _LOCATION if name in options}
        source = locate(name_or_path, **where)
        if (path := source.get("config.json")) is None:
            raise source.missing("config.json")
        return cls.from_json_file(path, **options)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write ``config.json`` to a folder, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(folder) / "config.json")

    def to_dict(self) -> dict[str, Any]:
        """All fields, and ``model_type``, as ``config.json`` holds them."""
        return {"model_type": self.model_type, **vars(self)}

    def to_json_string(self) -> str:
        """What `save_pretrained` writes into ``config.json``."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | Path) -> None:
        """Write `to_json_string` to a file."""
        Path(path).write_text(self.to_json_string(), encoding="utf-8")

    @property
    def embedding_rows(self) -> int:
        """Rows of the token embedding."""
        return self.vocab_size

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_size(self) -> int:
        """Width inside the perceptron."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def attention_scale(self, layer: int) -> float:
        """The factor of the attention scores in block ``layer``."""
        scale = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    # NaN compares false with everything, so the range checks above reject it.
    return isinstance(value, int | float) and not isinstance(value, bool)
