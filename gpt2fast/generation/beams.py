"""Beam search.

Each prompt has ``num_beams`` running hypotheses. A step extends each by every token, keeps the best
``num_beams`` that have not ended, and files those that have, scored by

    sum of log-probabilities / length ** length_penalty

with the length counted in new tokens. Scores, order and stopping are those of transformers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2fast.generation.decoding import Decoder, Request
from gpt2fast.generation.sampling import check_scores
from gpt2fast.generation.stopping import RUNNING

_NEVER = -1.0e9  # the score of a hypothesis that does not take part


@dataclass
class Hypotheses:
    """N hypotheses for each of B prompts, with room for ``S`` new tokens.

    Attributes:
        sequences: ``[B, N, T + S]``, prompts and new tokens.
        scores: ``[B, N]``.
        origins: ``[B, N, S]``, the row of the batch that each new token was predicted by; -1 for
            none yet.
        logprobs: ``[B, N, S]``, of each new token under the model.
        reasons: ``[B, N]``, codes of `gpt2fast.generation.stopping.FINISH_REASONS`.
    """

    sequences: Tensor
    scores: Tensor
    origins: Tensor
    logprobs: Tensor
    reasons: Tensor

    def pick(self, index: Tensor) -> "Hypotheses":
        """Those at ``index`` ``[B, M]``; a copy."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        return Hypotheses(*(value[rows, index] for value in vars(self).values()))

    def beside(self, other: "Hypotheses") -> "Hypotheses":
        """These and the other ones."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Hypotheses(*(torch.cat(pair, dim=1) for pair in pairs))


class BeamSearch:
    """A beam search over a request.

    Attributes:
        done: after `run`, the best ended hypotheses, best first.
        scores, logits: of each step, ``[B * num_beams, V]``, kept where the options ask for it.
    """

    def __init__(self, decoder: Decoder, request: Request) -> None:
        self._decoder = decoder
        self._request = request
        self._beams = beams = request.options.num_beams
        ids = request.prompts.ids
        batch, room = len(ids), request.new_tokens
        sequences = ids.new_full((batch, beams, ids.shape[1] + room), request.pad)
        sequences[:, :, : ids.shape[1]] = ids[:, None]
        self.done = Hypotheses(
            sequences,
            torch.full((batch, beams), _NEVER, device=ids.device),
            ids.new_full((batch, beams, room), -1),
            torch.zeros(batch, beams, room, device=ids.device),
            torch.zeros(batch, beams, dtype=torch.int8, device=ids.device),
        )
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    @torch.no_grad()
    def run(self) -> None:
        """Search until no prompt's result can change."""
        request, beams = self._request, self._beams
        ids = request.prompts.ids
        start = ids.shape[1]
        stopping, processors = request.stopping(), request.processors(beams)
        # All beams begin alike: only the first counts in the first step.
        running = self.done.pick(torch.arange(beams, device=ids.device).expand(len(ids), -1))
        running.scores[:, 0] = 0
        # Whether a prompt's running hypotheses may still beat its ended ones.
        hopeful = torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device)
        for step in range(request.new_tokens):
            flat = running.sequences[:, :, : start + step].flatten(0, 1)
            if step == 0:
                logits = self._decoder.prefill(ids).repeat_interleave(beams, 0)
                self._decoder.expand(beams)
            else:
                logits = self._decoder.step(flat)
            logprobs = logits.log_softmax(-1)
            scores = logprobs
            for process in processors:
                scores = process(flat, scores)
            check_scores(scores)
            self._keep(logits, scores)
            candidates = self._extend(running, scores, logprobs, step)
            ends = candidates.sequences[:, :, : start + step + 1].flatten(0, 1)
            candidates.reasons = stopping(ends, step + 1).view_as(candidates.reasons)
            ended = candidates.reasons != RUNNING
            self._file(candidates, ended, hopeful, step)
            candidates.scores = candidates.scores + _NEVER * ended
            running = candidates.pick(candidates.scores.topk(beams).indices)
            hopeful &= self._may_improve(running, step)
            if ended.all() or not hopeful.any() or (self._full().all() and self._stops_early):
                break
            self._decoder.reorder(running.origins[:, :, step].flatten())

    @property
    def _stops_early(self) -> bool:
        return self._request.options.early_stopping is True

    def _full(self) -> Tensor:
        """``[B, 1]``: prompts that have ``num_beams`` ended hypotheses."""
        return (self.done.reasons != RUNNING).all(1, keepdim=True)

    def _keep(self, logits: Tensor, scores: Tensor) -> None:
        if self._request.options.output_logits:
            self.logits.append(logits)
        if self._request.options.output_scores:
            self.scores.append(scores)

    def _extend(
        self, running: Hypotheses, scores: Tensor, logprobs: Tensor, step: int
    ) -> Hypotheses:
        """The best extensions of ``running`` by one token, best first: enough of them that
        ``num_beams`` go on even if the others end."""
        beams, (rows, vocab_size) = self._beams, scores.shape
        total = (running.scores[:, :, None] + scores.view(-1, beams, vocab_size)).flatten(1)
        count = min(max(2, 1 + len(self._request.eos)) * beams, total.shape[1])
        best, index = total.topk(count)
        parents, tokens = index // vocab_size, index % vocab_size
        candidates = running.pick(parents)
        candidates.scores = best
        candidates.sequences[:, :, self._request.prompts.ids.shape[1] + step] = tokens
        origins = parents + torch.arange(0, rows, beams, device=parents.device)[:, None]
        candidates.origins[:, :, step] = origins
        candidates.logprobs[:, :, step] = logprobs[origins, tokens]
        return candidates

    def _file(self, candidates: Hypotheses, ended: Tensor, hopeful: Tensor, step: int) -> None:
        """Put the candidates that have ended among the ``num_beams`` best into `done`."""
        files = ended & hopeful
        files[:, self._beams :] = False
        if self._stops_early:
            files &= ~self._full()
        penalty = (step + 1) ** self._request.options.length_penalty
        filed = Hypotheses(**vars(candidates))
        filed.scores = torch.where(files, candidates.scores / penalty, _NEVER)
        filed.reasons = candidates.reasons * files
        pool = self.done.beside(filed)
        self.done = pool.pick(pool.scores.topk(self._beams).indices)

    def _may_improve(self, running: Hypotheses, step: int) -> Tensor:
        """``[B, 1]``: the best running hypothesis may come to beat the worst ended one."""
        options, lengths = self._request.options, [step + 1]
        if options.early_stopping == "never" and options.length_penalty > 0:
            lengths = list(self._request.allowed)
        penalties = torch.tensor([length**options.length_penalty for length in lengths])
        reach = running.scores[:, :1] / penalties[:, None].to(running.scores.device)
        worst = self.done.scores.min(1, keepdim=True).values
        return ~self._full() | (reach > worst)
