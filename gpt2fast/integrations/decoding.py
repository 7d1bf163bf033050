"""``generate`` of an accelerated model: what the decode engine serves exactly goes through it.

Behind the model of transformers stands one of ours that holds the very same parameters
(`stand_in`), so nothing is copied and whatever is trained, loaded or moved is seen. Greedy tokens
are those of transformers. Sampling draws from the same distribution, but not the same tokens:
transformers draws from torch's global generator at each token, the engine from counter-based
streams whose seed it takes from that generator, so ``torch.manual_seed`` repeats a call here as
there.

Everything else runs transformers' own ``generate``: beams, processors and criteria of one's own,
assistants, outputs beside the tokens, a past, prompts beyond the context, hooked or adapted
modules, dropout.
"""

from typing import Any

import torch
from torch import Tensor

from gpt2fast import model as gpt2
from gpt2fast.base import as_config
from gpt2fast.engine.kept import STAND_INS, why_not_kept
from gpt2fast.kernels.decode_state import MAX_EOS

# Fields of a GenerationConfig that are passed on, and those without effect on what is served.
_PASSED = {
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "temperature"),
    *("top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id", "pad_token_id"),
    "num_return_sequences",
}
_INERT = {
    *("bos_token_id", "decoder_start_token_id", "transformers_version", "use_cache"),
    *("early_stopping", "length_penalty", "_from_model_config", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "num_beam_groups", "diversity_penalty"),
}
# Values that mean "off" in one version or another.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "cache_implementation": "dynamic",
}


class Generates:
    """Adds to a language model of transformers a ``generate`` that uses the engine."""

    _gpt2fast_generates: bool

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' ``generate``, on the decode engine of this package where that serves."""
        if self._gpt2fast_generates and not args:
            served = _serve(self, inputs, generation_config, kwargs)
            if served is not None:
                return served
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]


def _serve(
    model: Any, inputs: Tensor | None, generation_config: Any, kwargs: dict[str, Any]
) -> Tensor | None:
    """The tokens, or None where transformers has to generate."""
    if torch.compiler.is_compiling():
        return None
    options = dict(kwargs)
    ids = options.pop("input_ids", None) if inputs is None else inputs
    mask, streamer = options.pop("attention_mask", None), options.pop("streamer", None)
    if not _is_batch(ids) or ids.device != model.device:
        return None
    # Arguments that are no options: processors, criteria, an assistant, a past.
    fields = vars(model.generation_config)
    if any(value is not None for name, value in options.items() if name not in fields):
        return None
    config, rest = model._prepare_generation_config(generation_config, **options)
    if any(value is not None for value in rest.values()) or not _is_plain(config):
        return None
    explicit = generation_config if kwargs.get("max_length") is None else None
    length = ids.shape[1]
    new = config.max_new_tokens
    if new is None:
        # A default length is relative to the prompt in some versions and not in others.
        given = kwargs.get("max_length") or getattr(explicit, "max_length", None)
        new = config.max_length - length if given == config.max_length else 0
    eos, pad = _ids(config.eos_token_id), _ids(config.pad_token_id)
    if mask is None:  # transformers knows padding by its id, unless that ends rows too
        mask = torch.ones_like(ids) if not pad or pad[0] in eos else ids != pad[0]
    if not _is_padded_on_the_left(ids, mask):
        return None
    padded = bool((mask == 0).any())
    penalty = 1.0 if config.repetition_penalty is None else config.repetition_penalty
    if (
        new < 1
        or length + new - 1 > model.config.n_positions
        or (padded and penalty != 1)  # transformers penalises the padding's id as well
        or not _can_sample(config)
    ):
        return None
    ours = stand_in(model)
    if ours is None or why_not_kept(ours) is not None:
        return None
    # Ids that no token has end nothing there; here they are an error.
    ends = [token for token in eos if 0 <= token < model.config.vocab_size]
    fill = [*pad, *eos][0] if ends else None
    if len(ends) > MAX_EOS or (fill is not None and not 0 <= fill < model.config.vocab_size):
        return None
    tokens = ours.generate(
        ids,
        attention_mask=mask,
        streamer=streamer,
        max_new_tokens=new,
        min_length=config.min_length or 0,
        min_new_tokens=config.min_new_tokens,
        eos_token_id=ends,
        pad_token_id=fill,
        repetition_penalty=float(penalty),
        do_sample=bool(config.do_sample),
        num_return_sequences=config.num_return_sequences or 1,
        **_sampling(config),
    )
    assert isinstance(tokens, Tensor)
    return tokens


def _is_batch(ids: Any) -> bool:
    """Whether they are a batch of prompts."""
    is_tensor = isinstance(ids, Tensor)
    return is_tensor and ids.dim() == 2 and ids.dtype == torch.long and ids.numel() > 0


def _is_padded_on_the_left(ids: Tensor, mask: Any) -> bool:
    """Whether a mask leaves out nothing but the beginnings of prompts."""
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return False
    kept = mask != 0
    return bool(kept[:, -1].all() and (kept[:, 1:] >= kept[:, :-1]).all())


def _ids(value: Any) -> list[int]:
    """An option's ids: one, several or none, in whatever form."""
    ids: list[int] = [] if value is None else torch.as_tensor(value).flatten().tolist()
    return ids


def _is_plain(config: Any) -> bool:
    """Whether a generation configuration asks for nothing that is not passed on."""
    return all(
        name in _PASSED
        or name in _INERT
        or value is None
        or value is False
        or _NEUTRAL.get(name) == value
        or (isinstance(value, dict | list) and not value)
        or (name.startswith("_") and not callable(value))
        for name, value in config.to_diff_dict().items()
    )


def _can_sample(config: Any) -> bool:
    """Whether the options for drawing are ones that transformers accepts and we have."""
    if not config.do_sample:
        return (config.num_return_sequences or 1) == 1
    temperature = 1.0 if config.temperature is None else config.temperature
    top_p = 1.0 if config.top_p is None else config.top_p
    return temperature > 0 and 0 < top_p <= 1


def _sampling(config: Any) -> dict[str, Any]:
    if not config.do_sample:
        return {}
    return {
        "temperature": 1.0 if config.temperature is None else float(config.temperature),
        "top_k": config.top_k or 0,
        "top_p": 1.0 if config.top_p is None else float(config.top_p),
        "min_p": None if config.min_p is None else float(config.min_p),
    }


def stand_in(model: Any) -> gpt2.GPT2LMHeadModel | None:
    """Our model with the parameters of ``model``, an accelerated ``GPT2LMHeadModel``.

    Returns:
        the same object as long as the parameters are the same; None where ours would not compute
        what the model does: something is hooked, adapted, replaced, or drops in training.
    """
    from gpt2fast.integrations.modules import is_untouched

    if not is_untouched(model):
        return None
    ours = STAND_INS.get(model)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(ours, gpt2.GPT2LMHeadModel):
        held = dict(ours.named_parameters(remove_duplicate=False))
        if held.keys() == theirs.keys() and all(held[n] is p for n, p in theirs.items()):
            return ours
    try:
        config = as_config(model.config)
    except (TypeError, ValueError):  # a field that ours does not know
        return None
    if config.vocab_size != len(model.lm_head.weight):
        return None
    with torch.device("meta"):
        ours = gpt2.GPT2LMHeadModel(config)
    for module_name, module in ours.named_modules():
        for name, built in list(module._parameters.items()):
            parameter = theirs.get(f"{module_name}.{name}")
            if built is None and parameter is None:  # a bias that neither has
                continue
            if built is None or parameter is None or parameter.shape != built.shape:
                return None
            module._parameters[name] = parameter
    STAND_INS[model] = ours.eval()
    return ours
