"""The keywords of ``generate`` and ``stream``: checked once, before anything is computed."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gpt2fast.config import GPT2Config

DEFAULT_NEW_TOKENS = 20  # transformers' default where no length is given

ScoresProcessor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What to generate; `gpt2fast.generation.GenerationMixin.generate` documents the fields.

    Raises:
        ValueError: a value is out of its range, or two contradict each other.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    logits_processor: Iterable[ScoresProcessor] | None = None
    eos_token_id: int | Sequence[int] | Tensor | None = None
    pad_token_id: int | None = None
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop_strings: str | Sequence[str] | None = None
    tokenizer: Any = None
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    context_policy: str = "stop"
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    output_logprobs: bool = False

    @classmethod
    def of(cls, keywords: dict[str, Any]) -> "GenerationOptions":
        """Options from keyword arguments; None stands for the default where it has no meaning.

        ``generation_config``, an object of transformers, gives what no keyword does.

        Raises:
            TypeError: a keyword is unknown.
            ValueError: see the class.
        """
        known = {field.name for field in fields(cls)}
        generation_config = keywords.get("generation_config")
        if generation_config is not None:
            stated = generation_config.to_diff_dict()
            # What is unknown here but switched off there changes nothing.
            stated = {name: v for name, v in stated.items() if name in known or v}
            keywords = {**stated, **keywords}
        keywords = {name: v for name, v in keywords.items() if name not in _WITHOUT_EFFECT}
        for name in keywords:
            if name not in known:
                raise TypeError(f"generate got an unexpected keyword argument {name!r}")
        return cls(**{name: v for name, v in keywords.items() if v is not None or name in _OFF})

    def __post_init__(self) -> None:
        for name in ("max_length", "max_new_tokens", "min_length", "min_new_tokens"):
            _check_count(name, getattr(self, name), 0)
        for name in ("top_k", "no_repeat_ngram_size"):
            _check_count(name, getattr(self, name), 0)
        for name in (
            "num_beams",
            "num_return_sequences",
            "prompt_lookup_num_tokens",
            "max_matching_ngram_size",
        ):
            _check_count(name, getattr(self, name), 1)
        temperature = self.temperature
        # Code in use turns sampling off and sets the temperature to 0 as well.
        if not (temperature == 0 and not self.do_sample):
            _check_positive("temperature", temperature)
        _check_positive("repetition_penalty", self.repetition_penalty)
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}")
        if self.min_p is not None and not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must be between 0 and 1; got {self.min_p}")
        if not _is_number(self.length_penalty) or not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a finite number; got {self.length_penalty}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping must be True, False or 'never'; got {self.early_stopping!r}"
            )
        if self.context_policy not in ("stop", "slide"):
            raise ValueError(
                f"context_policy must be 'stop' or 'slide'; got {self.context_policy!r}"
            )
        self._check_combinations()

    def _check_combinations(self) -> None:
        beams, returned = self.num_beams, self.num_return_sequences
        if beams > 1 and self.do_sample:
            raise ValueError(f"do_sample=True cannot be combined with num_beams={beams}")
        if not self.do_sample and returned > beams:
            raise ValueError(
                f"num_return_sequences must be at most num_beams without sampling; "
                f"got num_return_sequences={returned}, num_beams={beams}"
            )
        if beams > 1 and self.prompt_lookup_num_tokens is not None:
            raise ValueError(
                f"prompt_lookup_num_tokens={self.prompt_lookup_num_tokens} cannot be combined with "
                f"num_beams={beams}"
            )
        if self.seed is not None and self.generator is not None:
            raise ValueError("give either seed or generator, and not both")
        if self.stop_strings is not None:
            if not self.stops or not all(isinstance(s, str) and s for s in self.stops):
                raise ValueError(f"stop_strings must be non-empty texts; got {self.stop_strings!r}")
            if self.tokenizer is None:
                raise ValueError("stop_strings need the tokenizer: pass tokenizer=")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop_strings is None:
            return ()
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else (*self.stop_strings,)

    def special_tokens(self, config: GPT2Config) -> tuple[list[int], int]:
        """The ids that end a row, and the id that fills it up after that.

        Raises:
            ValueError: an id given is outside the vocabulary.
        """
        vocab_size = config.vocab_size
        if self.eos_token_id is None:
            # A small vocabulary under a configuration's default ids never meets them.
            eos = [i for i in _as_ids(config.eos_token_id) if 0 <= i < vocab_size]
        else:
            eos = _as_ids(self.eos_token_id)
            for token_id in eos:
                _check_id("eos_token_id", token_id, vocab_size)
        pad = self.pad_token_id
        if pad is not None:
            _check_id("pad_token_id", pad, vocab_size)
        elif config.pad_token_id is not None and 0 <= config.pad_token_id < vocab_size:
            pad = config.pad_token_id
        return eos, pad if pad is not None else eos[0] if eos else 0

    def new_tokens(self, prompt_length: int, n_positions: int) -> int:
        """How many tokens to generate at most after prompts padded to ``prompt_length``.

        Raises:
            ValueError: ``max_length`` leaves no room after the prompt.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is not None:
            if self.max_length <= prompt_length:
                raise ValueError(
                    f"max_length must be more than the prompt's {prompt_length} tokens, which it "
                    f"counts; got {self.max_length} (max_new_tokens counts the new ones alone)"
                )
            return self.max_length - prompt_length
        if self.context_policy == "slide":
            return DEFAULT_NEW_TOKENS
        return min(DEFAULT_NEW_TOKENS, max(n_positions - prompt_length, 1))

    def least_length(self, prompt_length: int) -> int:
        """The length, with the padded prompt, before which no row may end."""
        if self.min_new_tokens is not None:
            return prompt_length + self.min_new_tokens
        return self.min_length


# Keywords of transformers that cannot change the tokens here: the cache is always used, and a
# generation_config has given its fields.
_WITHOUT_EFFECT = (
    "use_cache",
    "generation_config",
    "bos_token_id",
    "transformers_version",
    "_from_model_config",
)

# Fields for which None switches something off, as in transformers, rather than being absent.
_OFF = ("top_k", "top_p", "min_p")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_ids(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        value = value.tolist()
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) else [value]


def _check_count(name: str, value: object, least: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")


def _check_positive(name: str, value: Any) -> None:
    # NaN compares false with everything.
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0; got {value}")


def _check_id(name: str, value: object, vocab_size: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ValueError(f"{name} must be in [0, {vocab_size}); got {value!r}")
