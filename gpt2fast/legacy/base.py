"""What the legacy models have in common, and the transformer without a head."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpt2fast import checkpoint, transformer
from gpt2fast.base import PreTrainedModel
from gpt2fast.config import GPT2Config as ModernConfig
from gpt2fast.legacy.config import GPT2Config
from gpt2fast.legacy.past import Presents, as_cache

_Model = TypeVar("_Model", bound="GPT2PreTrainedModel")


class GPT2PreTrainedModel(PreTrainedModel):
    """What the legacy models have in common; they share one `GPT2Config` with their parts."""

    config: GPT2Config

    def __init__(self, config: ModernConfig) -> None:
        if not isinstance(config, GPT2Config):
            config = GPT2Config.from_dict(config.to_dict())
        super().__init__(config)

    @torch.no_grad()
    def _init_parameter(self, name: str, parameter: Tensor) -> None:
        # The generation before residual projections were scaled by depth.
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            parameter.normal_(0.0, 0.02)
        else:
            super()._init_parameter(name, parameter)

    def set_num_special_tokens(
        self, num_special_tokens: int, predict_special_tokens: bool = True
    ) -> None:
        """Give the token embedding this many rows behind the vocabulary's; new ones are random.

        Args:
            num_special_tokens: at least 0.
            predict_special_tokens: whether the language-model head scores them too.

        Raises:
            ValueError: the number is negative.
        """
        raise NotImplementedError

    def set_tied(self) -> None:
        """Make the language-model head's weight the token embedding's again."""
        self.tie_weights()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        state_dict: Mapping[str, Tensor] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        from_tf: bool = False,
        num_special_tokens: int | None = None,
        **kwargs: Any,
    ) -> _Model:
        """Load a checkpoint of any published form; the model is in training mode, in float32.

        Args:
            pretrained_model_name_or_path: a preset such as "gpt2", "bundled", a folder, a file, an
                archive, or a repository of the Hub.
            state_dict: tensors to load instead of the checkpoint's.
            cache_dir: where to keep downloads.
            from_tf: not supported: must be False.
            num_special_tokens: rows for special tokens; None as the configuration says.
            **kwargs: as :func:`gpt2fast.checkpoint.from_pretrained`.

        Raises:
            ValueError: ``from_tf``; the checkpoint is damaged or does not fit.
            FileNotFoundError: the checkpoint or one of its files is nowhere to be found.
        """
        if from_tf:
            raise ValueError(
                "from_tf=True: TensorFlow checkpoints are not read here; convert "
                f"{os.fspath(pretrained_model_name_or_path)!r} to PyTorch first"
            )
        if not kwargs.keys() & {"dtype", "torch_dtype"}:
            kwargs["dtype"] = torch.float32
        model: _Model = checkpoint.from_pretrained(
            cls,
            pretrained_model_name_or_path,
            state_dict=state_dict,
            cache_dir=cache_dir,
            **kwargs,
        )
        if num_special_tokens is not None:
            model.set_num_special_tokens(num_special_tokens, model.config.predict_special_tokens)
        return model.train()


class GPT2Model(GPT2PreTrainedModel, transformer.GPT2Model):
    """The transformer without a head.

    Args:
        config: a `GPT2Config` of either generation; weights are freshly initialised.
    """

    def __init__(self, config: ModernConfig) -> None:
        super().__init__(config)
        self.register_state_dict_post_hook(_add_masks)
        self.register_load_state_dict_pre_hook(_drop_masks)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past: Iterable[Tensor] | None = None,
        *,
        use_cache: bool = True,
    ) -> tuple[Any, ...]:
        """Hidden states of every position, and the presents.

        Args:
            input_ids: ``[..., T]`` integers in ``[0, total_tokens_embeddings)``; leading
                dimensions are flattened into the batch B. Only the new ones where a past is given.
            position_ids: ``[..., T]``; by default they continue at the past's length.
            token_type_ids: ``[..., T]``, embedded with the token embedding.
            past: the presents of a former call, or any tensors ``[2, B, H, P, D]``, one a layer.
            use_cache: False leaves the presents out: None stands for them.

        Returns:
            Hidden states ``[..., T, C]`` and presents, a list of ``[2, B, H, P + T, D]``; first the
            list of attention weights ``[B, H, T, P + T]`` if the configuration's
            ``output_attentions`` is true.

        Raises:
            ValueError: ids or positions out of range, shapes that do not agree, empty input, a
                context longer than ``n_ctx``.
        """
        cache = as_cache(past)
        length = input_ids.shape[-1] if input_ids.dim() else 0
        past_length = 0 if cache is None else cache.get_seq_length()
        if past_length + length > self.config.n_ctx:
            raise ValueError(
                f"the context holds {self.config.n_ctx} positions; got {past_length} in the past "
                f"and {length} new ones"
            )
        out: Any = super().forward(
            input_ids,
            cache,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
        )
        # Gradient checkpointing leaves no past, whatever was asked for.
        presents = None if out.past_key_values is None else Presents(out.past_key_values)
        if out.attentions is None:
            return out.last_hidden_state, presents
        return list(out.attentions), out.last_hidden_state, presents

    def set_num_special_tokens(
        self, num_special_tokens: int, predict_special_tokens: bool = True
    ) -> None:
        if num_special_tokens < 0:
            raise ValueError(f"num_special_tokens must be at least 0; got {num_special_tokens}")
        config = self.config
        config.predict_special_tokens = predict_special_tokens
        if num_special_tokens == config.n_special:
            return
        config.n_special = num_special_tokens
        old = self.wte.weight
        weight = old.new_empty(config.total_tokens_embeddings, config.n_embd)
        self._init_parameter("wte.weight", weight)
        rows = min(len(old), len(weight))
        weight[:rows] = old.detach()[:rows]
        self.wte = nn.Embedding.from_pretrained(weight, freeze=not old.requires_grad)

    def resize_token_embeddings(
        self, new_num_tokens: int, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """As `gpt2fast.GPT2Model`'s; all rows count as the vocabulary's afterwards."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of)
        self.config.n_special = 0
        return embeddings


def _mask_names(model: nn.Module, prefix: str) -> list[str]:
    assert isinstance(model, GPT2Model)
    return [f"{prefix}h.{i}.attn.bias" for i in range(len(model.h))]


def _add_masks(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Put the causal masks into a state dict: there they were buffers, and loading insists."""
    assert isinstance(model, GPT2Model)
    n_ctx = model.config.n_ctx
    mask = model.ln_f.weight.detach().new_ones(1, 1, n_ctx, n_ctx).tril()
    state_dict.update(dict.fromkeys(_mask_names(model, prefix), mask))


def _drop_masks(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take them out again, where a module around this one loads what it saved."""
    for name in _mask_names(model, prefix):
        state_dict.pop(name, None)
