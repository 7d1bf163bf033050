"""What every GPT-2 model of this package has in common: where its weights come from and go to."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from gpt2fast.config import GPT2Config

_Model = TypeVar("_Model", bound="PreTrainedModel")


class PreTrainedModel(nn.Module):
    """Base of the GPT-2 models: loading, saving, initialisation, and a few properties.

    A subclass sets ``base_model_prefix`` to the name of the attribute that holds its
    :class:`GPT2Model` ("" where it is one itself), so that a checkpoint fits with or without
    that prefix.
    """

    base_model_prefix: str = "transformer"
    config: GPT2Config

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = as_config(config)
        self.gradient_checkpointing = False

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the elements of the parameters; a tied head counts once, with the embedding."""
        embeddings = {
            id(module.weight)
            for module in self.modules()
            if exclude_embeddings and isinstance(module, nn.Embedding)
        }
        return sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable) and id(p) not in embeddings
        )

    def tie_weights(self) -> None:
        """Make tied parameters one again; a model without any does nothing here."""

    def init_weights(self) -> None:
        """Initialise every parameter as GPT-2 does."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                self._init_parameter(name, parameter)

    @torch.no_grad()
    def _init_parameter(self, name: str, parameter: torch.Tensor) -> None:
        """GPT-2's initialisation (Radford et al., 2019, section 2.3), told apart by the name.

        Weights are normal with ``initializer_range``; those that write to the residual stream
        are scaled by ``1/sqrt(2 * n_layer)``, one for each of its additions.
        """
        if parameter.is_meta:
            return  # nothing to set, and random numbers there import half of PyTorch's compiler
        module, _, leaf = name.rpartition(".")
        if leaf == "bias":
            parameter.zero_()
        elif module.rpartition(".")[2].startswith("ln_"):
            parameter.fill_(1.0)
        else:
            std = self.config.initializer_range
            if module.endswith("c_proj"):
                std /= math.sqrt(2 * self.config.n_layer)
            parameter.normal_(0.0, std)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute each layer's activations in the backward pass instead of keeping them.

        Raises:
            ValueError: ``use_reentrant``, ``every_n_layers`` or ``offload`` is not the default.
        """
        if gradient_checkpointing_kwargs and gradient_checkpointing_kwargs.get("use_reentrant"):
            raise ValueError("gradient_checkpointing_kwargs: only use_reentrant=False is supported")
        if every_n_layers != 1 or offload:
            raise ValueError(
                "only every_n_layers=1 and offload=False are supported; "
                f"got {every_n_layers} and {offload}"
            )
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass: the default."""
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return self.gradient_checkpointing

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.gradient_checkpointing = value

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `torch.nn.Module.load_state_dict`, for names of every published form.

        Entries are renamed to this model's names, old mask buffers are ignored, and a tied head
        may be absent.
        """
        from gpt2fast.checkpoint.names import merge_tied, rename_for

        renamed = rename_for(self, state_dict)
        for second, first in merge_tied(self, renamed).items():
            if first in renamed:
                renamed[second] = renamed[first]
        result = super().load_state_dict(renamed, strict=strict, assign=assign)
        self.tie_weights()
        return result

    @classmethod
    def from_pretrained(
        cls: type[_Model], name_or_path: str | os.PathLike[str] | None, **kwargs: Any
    ) -> _Model:
        """Load a checkpoint: see :func:`gpt2fast.checkpoint.from_pretrained`."""
        from gpt2fast import checkpoint

        return checkpoint.from_pretrained(cls, name_or_path, **kwargs)

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config and weights: see :func:`gpt2fast.checkpoint.save_pretrained`."""
        from gpt2fast import checkpoint

        checkpoint.save_pretrained(self, folder, **kwargs)


def as_config(config: Any) -> GPT2Config:
    """A configuration as it is, or this package's of the same fields for one of transformers.

    Raises:
        TypeError: it is no configuration.
        ValueError: it describes another kind of model.
    """
    if isinstance(config, GPT2Config):
        return config
    if not hasattr(config, "to_dict"):
        raise TypeError(f"expected a GPT2Config; got {type(config).__name__}")
    return GPT2Config.from_dict(config.to_dict())
