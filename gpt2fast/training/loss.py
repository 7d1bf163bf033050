"""The model and its loss as one module: the unit that processes share, shard and compile."""

import torch
from torch import nn

from gpt2fast.model import GPT2LMHeadModel
from gpt2fast.training.sampled_head import sampled_head_loss

IGNORED = -100


class LanguageModelLoss(nn.Module):
    """Token ids to a loss.

    Everything that reads a weight happens in this ``forward``: with FSDP a weight is whole only
    there, and DDP counts the gradients that come out of it.

    Args:
        model: the model to train.
        dtype: of the matrix products in training.
    """

    def __init__(self, model: GPT2LMHeadModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(
        self,
        rows: torch.Tensor,
        labels: torch.Tensor | None = None,
        sample: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The cross-entropy of ``rows``, int64 ``[B, T]``, in nats: a scalar.

        With ``labels`` ``[B, T]``, for evaluation: the sum over those that are not ``IGNORED``, in
        the weights' dtype. Without, for training: the mean of the T - 1 predictions a row, over
        the whole vocabulary or over ``sample``, the ids and the logarithms of their inclusion
        probabilities from a VocabularySampler. B * T is then a multiple of ``n_positions``.
        """
        model = self.model
        if labels is not None:
            return model(rows, labels=labels, use_cache=False, num_items_in_batch=1).loss
        batch, length = rows.shape
        # Rows keep their positions in the block, so that every position is trained throughout.
        positions = torch.arange(model.config.n_positions, device=rows.device)
        positions = positions.view(-1, length).repeat(batch * length // len(positions), 1)
        enabled = self.dtype is not torch.float32
        with torch.autocast(rows.device.type, dtype=self.dtype, enabled=enabled):
            if sample is None:
                return model(rows, labels=rows, position_ids=positions, use_cache=False).loss
            hidden = model.transformer(rows, position_ids=positions, use_cache=False)[0]
        hidden = hidden[:, :-1].flatten(0, 1)
        return sampled_head_loss(
            hidden.float(),
            model.lm_head.weight,
            rows[:, 1:].flatten(),
            *sample,
            dtype=self.dtype,
        )
