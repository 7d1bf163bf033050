"""A step of a whole model by each contender: set up once, for its answers, its time, its memory.

| kind | a step | its answers |
| --- | --- | --- |
| training | forward, backward and AdamW on ``[B, T]`` ids | the loss, every gradient |
| prefill | a forward pass with a cache | logits of the last position, last keys and values |
| scoring | the log-probability of every token of texts, as numbers in Python | those |
| perplexity | the mean loss of ``[B, T]`` ids, as the loss of a forward pass | it |
| generate | greedy tokens behind ``[B, T]`` prompts | those |

Training keeps weights in float32 and, where 16 bits are asked for, multiplies under autocast;
everything else has weights of that dtype.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpt2fast
from bench.suite import step_cases as names
from bench.suite.decode_peers import random_model, transformers_generate, transformers_model
from bench.suite.plain import PlainGPT2
from bench.suite.step_cases import StepCase

Answers = dict[str, Tensor]

# How far answers in float32 may lie apart: sums in another order, up to 48 layers deep.
EXACT = 1e-4
_BATCHES = 4  # of ids, in rotation
_ROWS = 16  # of texts that the loop over logits takes at a time


def source_model(case: StepCase, dtype: torch.dtype, device: torch.device) -> Any:
    """The weights of everybody: one of our models."""
    torch.manual_seed(0)
    kept = torch.float32 if case.kind == names.TRAINING else dtype
    return random_model(case.model, case.fields(), kept, device)


def inputs_of(case: StepCase, device: torch.device) -> Any:
    """Batches of ids ``[4, B, T]``; to score, a list of texts of ids."""
    vocab = gpt2fast.GPT2Config(**case.fields()).vocab_size
    torch.manual_seed(1)
    if case.kind == names.SCORING:
        return [torch.randint(vocab, (n,)).tolist() for n in case.lengths()]
    return torch.randint(vocab, (_BATCHES, case.batch, case.length)).to(device)


class Step:
    """Called, it is the step that is timed; `answers` are what the gate looks at.

    Args:
        model: whose weights they are.
        run: its forward pass, compiled or not.
        inputs: as `inputs_of`.
    """

    def __init__(self, model: Any, run: Callable[..., Any], inputs: Any) -> None:
        self.model, self.run, self.inputs = model, run, inputs

    def __call__(self) -> Any:
        raise NotImplementedError

    def answers(self) -> Answers:
        raise NotImplementedError


class Training(Step):
    """``autocast`` gives the context of the forward pass.

    Attributes:
        loss: of the last step.
    """

    def __init__(
        self,
        model: Any,
        run: Callable[..., Any],
        inputs: Any,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__(model.train(), run, inputs)
        self._autocast, self._done = autocast, 0
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.loss: Tensor | None = None

    def _backward(self, ids: Tensor) -> Tensor:
        with self._autocast():
            loss: Tensor = self.run(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        self.loss = self._backward(self.inputs[self._done % len(self.inputs)])
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done += 1

    def answers(self) -> Answers:
        loss = self._backward(self.inputs[0])
        found = {"loss": loss, **dict(_gradients(self.model))}
        self._optimizer.zero_grad()
        return found


def _gradients(model: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model, PlainGPT2):
        yield from model.published_gradients()
        return
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad


class Prefill(Step):
    @torch.no_grad()
    def __call__(self) -> Any:
        return self.run(self.inputs[0], use_cache=True, logits_to_keep=1)

    def answers(self) -> Answers:
        out = self()
        past = out.past_key_values
        if hasattr(past, "layers"):
            key, value = past.layers[-1].keys, past.layers[-1].values
        else:
            key, value = list(past)[-1]
        return {"logits": out.logits[:, -1], "keys": key, "values": value}


class Scoring(Step):
    """By the loop over logits that everybody writes; rows padded on the right need no mask.

    Args:
        by_length: texts of like length share a batch.
    """

    def __init__(self, model: Any, run: Callable[..., Any], inputs: Any, by_length: bool) -> None:
        super().__init__(model, run, inputs)
        places = range(len(inputs))
        order = sorted(places, key=lambda i: len(inputs[i])) if by_length else list(places)
        self._batches = [order[i : i + _ROWS] for i in range(0, len(order), _ROWS)]

    @torch.no_grad()
    def __call__(self) -> list[list[float]]:
        device = next(self.model.parameters()).device
        found: list[list[float]] = [[]] * len(self.inputs)
        for batch in self._batches:
            rows = [self.inputs[i] for i in batch]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows]).to(device)
            logits = self.run(ids, use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses_of_rows = losses.view(len(rows), -1).tolist()
            for i, row, values in zip(batch, rows, losses_of_rows, strict=True):
                found[i] = [-value for value in values[: len(row) - 1]]
        return found

    def answers(self) -> Answers:
        return {"log_probs": torch.tensor([value for row in self() for value in row])}


class OurScoring(Step):
    """By `gpt2fast.Scorer`."""

    def __init__(self, model: Any, inputs: Any) -> None:
        super().__init__(model, model, inputs)
        self._scorer = gpt2fast.Scorer(model)

    def __call__(self) -> list[Any]:
        return self._scorer(self.inputs)

    def answers(self) -> Answers:
        return {
            "log_probs": torch.tensor([v for s in self() for v in s.log_probs if v is not None])
        }


class Perplexity(Step):
    @torch.no_grad()
    def __call__(self) -> float:
        ids = self.inputs[0]
        return float(self.run(ids, labels=ids, use_cache=False).loss)

    def answers(self) -> Answers:
        return {"loss": torch.tensor(self())}


class Generate(Step):
    """``run`` takes ids and how many tokens are wanted."""

    def __init__(self, model: Any, run: Callable[..., Any], inputs: Any, new_tokens: int) -> None:
        super().__init__(model, run, inputs)
        self._new = new_tokens

    def __call__(self) -> Any:
        return self.run(self.inputs[0], self._new)

    def answers(self) -> Answers:
        return {"tokens": self()}


def model_of(name: str, source: Any) -> Any:
    """A contender's model with the weights of the source, which is used itself where it can be."""
    if name in (names.OURS, names.OURS_COMPILED):
        return source
    if name == names.PLAIN_COMPILED:
        return PlainGPT2(source).eval()
    activation = "gelu_pytorch_tanh" if name == names.TUNED else "gelu_new"
    attention = "eager" if name == names.EAGER else "sdpa"
    theirs = transformers_model(source, activation, attention)
    if name in (names.ACCELERATED, names.ACCELERATED_COMPILED):
        return gpt2fast.accelerate(theirs)
    return theirs


def step_of(
    case: StepCase, model: Any, inputs: Any, *, dtype: torch.dtype, name: str = "", compiled: bool
) -> Step:
    """The step of a model.

    Args:
        name: of the contender, where it has a way of its own.
        compiled: by ``torch.compile``, for these shapes.
    """
    if case.kind == names.GENERATE:
        run = transformers_generate(model, static=compiled)
        return Generate(model, run, inputs, case.new_tokens)
    run = torch.compile(model, dynamic=False) if compiled else model
    if case.kind == names.TRAINING:

        def autocast() -> AbstractContextManager[Any]:
            device = next(model.parameters()).device.type
            return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)

        return Training(model, run, inputs, autocast)
    if case.kind == names.SCORING:
        if name == names.OURS:
            return OurScoring(model, inputs)
        return Scoring(model, run, inputs, by_length=name == names.SORTED)
    return {names.PREFILL: Prefill, names.PERPLEXITY: Perplexity}[case.kind](model, run, inputs)


def set_up(
    case: StepCase, name: str, source: Any, inputs: Any, dtype: torch.dtype, may_compile: bool
) -> Step:
    """A contender's step, with weights of its own where it changes them."""
    if case.kind == names.TRAINING and name in (names.OURS, names.OURS_COMPILED):
        source = copy.deepcopy(source)
    compiled = may_compile and name in names.COMPILING
    model = model_of(name, source)
    return step_of(case, model, inputs, dtype=dtype, name=name, compiled=compiled)
