"""``generate`` and ``stream``: text from a language model, one token after the other."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from gpt2fast.engine.runner import OutOfMemory
from gpt2fast.generation.beams import BeamSearch
from gpt2fast.generation.decoding import Decoder, Decoding, Line, Request
from gpt2fast.generation.options import GenerationOptions
from gpt2fast.generation.served import Served
from gpt2fast.generation.stopping import FINISH_REASONS, LENGTH
from gpt2fast.outputs import ModelOutput
from gpt2fast.tokenizer import GPT2Tokenizer, StreamDecoder

if TYPE_CHECKING:
    from gpt2fast.generation.decoding import LanguageModel


class GenerateOutput(ModelOutput):
    """What `GenerationMixin.generate` returns with ``return_dict_in_generate=True``.

    R rows: ``num_return_sequences`` for each prompt, side by side. S steps.

    Attributes:
        sequences: ``[R, T + S]``, prompts and new tokens, filled up with the padding token.
        sequences_scores: ``[R]``, of a beam search: the sum of (processed) log-probabilities over
            ``length ** length_penalty``.
        scores: with ``output_scores``, for each step ``[R, V]`` float32 after all processors (of
            log-probabilities ``[B * num_beams, V]`` in a beam search).
        logits: with ``output_logits``, for each step the model's own, in float32.
        beam_indices: ``[R, S]``, of a beam search: the row of the batch each token came from, -1
            after the end.
        past_key_values: a `KVCache` of every token but the last of each row; None after the
            context has slid, and of a beam search.
        logprobs: with ``output_logprobs``, ``[R, S]``: of each new token under the model, before
            all processors; 0 after the row's end.
        finish_reasons: why each row ended: "eos", "stop_string", "length" (as many tokens as were
            asked for) or "context" (the model has no more positions).
    """

    _fields = (
        "sequences",
        "sequences_scores",
        "scores",
        "logits",
        "beam_indices",
        "past_key_values",
        "logprobs",
        "finish_reasons",
    )


class StreamStep(NamedTuple):
    """One step of `GenerationMixin.stream`.

    Attributes:
        token_ids: the new token of each row; None for a row that has ended before.
        text: with a tokenizer, the new text of each row: whole characters only, so often "", and
            without the token that ended the row. None without one.
        finish_reasons: for each row why it ended, or None while it goes on.
        logprobs: with ``output_logprobs``, of each row's token under the model.
    """

    token_ids: list[int | None]
    text: list[str] | None
    finish_reasons: list[str | None]
    logprobs: list[float] | None


class GenerationMixin:
    """Adds `generate` and `stream` to a model with a transformer and a language-model head."""

    def generate(
        self,
        input_ids: Any = None,
        *,
        inputs: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        streamer: Any = None,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Continue prompts: greedily, by sampling or by beam search.

        Keywords mean what they mean in transformers, and greedy tokens and beams are the same.
        Each row comes out as it would alone: rows have their own positions, random numbers and
        end. Runs in the mode the model is in; call ``eval()`` first to be rid of dropout. Most
        calls run on a decode engine that stays with the model for the next; `gpt2fast.release`
        frees its memory.

        Args:
            input_ids: ``[B, T]`` or ``[T]`` token ids; or a list of prompts of any lengths, each a
                list or tensor, padded on the left here. Default: ``config.bos_token_id``.
            inputs: another name of ``input_ids``.
            attention_mask: ``[B, T]``, 0 for padding, which must stand on the left. Without it a
                ``pad_token_id`` that does not end rows too counts as padding where it stands in a
                tensor of ``input_ids``.
            past_key_values: keys and values of the first tokens of ``input_ids``, which holds
                those tokens as well. Never changed.
            streamer: ``streamer.put(ids)`` receives the prompts ``[R, T]`` and then each step's
                tokens ``[R]``, on the CPU; ``streamer.end()`` ends it. Not with beams.
            max_new_tokens: how many tokens to generate at most; default 20.
            max_length: the same with the padded prompt counted; ``max_new_tokens`` goes first.
            min_new_tokens, min_length: no row ends by ``eos_token_id`` before that.
            eos_token_id: an id or several that end a row; default ``config.eos_token_id``; an
                empty list for none.
            pad_token_id: fills up rows that ended; default ``config.pad_token_id``, then the first
                ``eos_token_id``, then 0.
            stop_strings: a text or several that end a row where they become complete, which may
                have begun in the prompt. Needs ``tokenizer``, with ``decode(ids)``.
            repetition_penalty: above 1 makes tokens that were there less likely (divides positive
                scores, multiplies negative ones).
            no_repeat_ngram_size: no sequence of so many tokens occurs twice; 0: off.
            logits_processor: functions of ids ``[R, T]`` and scores ``[R, V]`` that return new
                scores, called after the two above and the minimum length.
            do_sample: draw tokens, from scores changed in this order:
            temperature: divides them.
            top_k: keeps the k best; 0 or None: all. The default is 50, as in transformers.
            top_p: keeps the likeliest that together reach this probability.
            min_p: keeps those at least this share as likely as the likeliest.
            seed: an integer that repeats a call: row i draws from stream (seed, i). Or a list with
                one seed a prompt, whose rows then repeat in any batch.
            generator: a ``torch.Generator`` to draw the seed from; default torch's global one, so
                that ``torch.manual_seed`` repeats a call.
            num_return_sequences: rows for each prompt.
            prompt_lookup_num_tokens: propose up to so many tokens at once, where the last few
                occurred before in the row, and keep those that would have been generated anyway:
                faster where a text repeats itself, and the tokens are the same, drawn ones too.
            max_matching_ngram_size: how many tokens that are at most; default 2, and never above
                32.
            num_beams: the width of a beam search, without sampling.
            length_penalty: see ``sequences_scores`` in `GenerateOutput`; above 0 favours length.
            early_stopping: of a beam search: True ends it with ``num_beams`` ended hypotheses,
                False when better ones are unlikely, "never" when they are impossible.
            context_policy: when a row needs more than the model's ``n_positions``: "stop" ends it
                (see ``finish_reasons``; its last token is the one predicted at the last position),
                "slide" keeps the last ``n_positions // 2`` tokens, evaluates them again from
                position 0, and goes on.
            return_dict_in_generate: return a `GenerateOutput`.
            output_scores, output_logits, output_logprobs: put these into it.
            use_cache: accepted without effect: the past is always used.
            generation_config: an object of transformers; its fields count where no keyword is
                given.

        Returns:
            ``[R, T + S]`` int64 on the device of ``input_ids``, prompts and new tokens, for
            R = B * ``num_return_sequences`` rows; or a `GenerateOutput`.

        Raises:
            TypeError: an unknown keyword.
            ValueError: a value out of range, ids outside the vocabulary, an empty prompt, a mask
                of another shape, padding at a row's end or a row of nothing else, a prompt longer
                than the context, logits that are NaN.
        """
        model = cast("LanguageModel", self)
        request = _prepare(model, input_ids, inputs, attention_mask, past_key_values, options)
        if request.options.num_beams > 1:
            if streamer is not None:
                raise ValueError(
                    "a beam search cannot be streamed: its tokens are known at the end"
                )
            output = _search(Decoder(model, request), request)
        else:
            output = _generate(model, request, streamer)
        ids = input_ids if inputs is None else inputs
        if isinstance(ids, Tensor):
            output.sequences = output.sequences.to(ids.device)
        return output if request.options.return_dict_in_generate else output.sequences

    def stream(
        self,
        input_ids: Any = None,
        *,
        inputs: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Iterator[StreamStep]:
        """Generate as `generate` does, handing out each token when it is known.

        What is wrong with the arguments is raised here, before the first step is asked for. Close
        the iterator, or drop it, to stop early.

        Args:
            (all): as in `generate`. A ``tokenizer`` must be a `gpt2fast.tokenizer.GPT2Tokenizer`:
                it gives the steps their text.

        Yields:
            a `StreamStep` for every token; text that ends within a character comes with the last.

        Raises:
            TypeError, ValueError: as `generate`; or beams, which are known only at the end.
        """
        model = cast("LanguageModel", self)
        request = _prepare(model, input_ids, inputs, attention_mask, past_key_values, options)
        if request.options.num_beams > 1:
            raise ValueError("a beam search cannot be streamed: its tokens are known at the end")
        tokenizer = request.options.tokenizer
        if tokenizer is not None and not isinstance(tokenizer, GPT2Tokenizer):
            raise ValueError(
                "the text of a stream needs a gpt2fast.tokenizer.GPT2Tokenizer; "
                f"got {type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
            )
        return _stream(model, request)


def _prepare(
    model: "LanguageModel",
    input_ids: Any,
    inputs: Any,
    attention_mask: Tensor | None,
    past_key_values: Any,
    options: dict[str, Any],
) -> Request:
    if input_ids is not None and inputs is not None:
        raise ValueError("give either input_ids or inputs, which are the same, and not both")
    ids = input_ids if inputs is None else inputs
    return Request.prepare(
        model, ids, attention_mask, past_key_values, GenerationOptions.of(options)
    )


def _reasons(codes: Tensor) -> tuple[str, ...]:
    # Only a request for no token at all leaves rows running.
    return tuple(FINISH_REASONS[code or LENGTH] for code in codes.tolist())


def _generate(model: "LanguageModel", request: Request, streamer: Any) -> GenerateOutput:
    served = Served.of(model, request)
    if served is not None:
        try:
            return _serve(served, request, streamer)
        except OutOfMemory as error:
            served.give_up(model, error)
            if streamer is not None:
                raise  # it has received tokens
        finally:
            served.close()
    return _decode(Decoding(Decoder(model, request), request), request, streamer)


def _serve(served: Served, request: Request, streamer: Any) -> GenerateOutput:
    options = request.options
    if streamer is None:
        served.run()
    else:
        prompts = request.prompts.ids.repeat_interleave(options.num_return_sequences, 0)
        streamer.put(prompts.cpu())
        for line in served.lines():
            ids = [request.pad if token is None else token for token in line.token_ids]
            streamer.put(torch.tensor(ids, device="cpu"))
        streamer.end()
    return GenerateOutput(
        sequences=served.sequences(),
        past_key_values=served.past() if options.return_dict_in_generate else None,
        logprobs=served.logprobs() if options.output_logprobs else None,
        finish_reasons=served.finish_reasons,
    )


def _decode(decoding: Decoding, request: Request, streamer: Any) -> GenerateOutput:
    options = request.options
    scores: list[Tensor] = []
    logits: list[Tensor] = []
    logprobs: list[Tensor] = []
    if streamer is not None:
        streamer.put(decoding.sequences.cpu())
    for step in decoding.steps():
        if streamer is not None:
            streamer.put(step.tokens.cpu())
        if options.output_scores:
            scores.append(step.scores)
        if options.output_logits:
            logits.append(step.logits)
        if options.output_logprobs:
            logprobs.append(step.logprobs())
    if streamer is not None:
        streamer.end()
    return GenerateOutput(
        sequences=decoding.sequences,
        scores=tuple(scores) if options.output_scores else None,
        logits=tuple(logits) if options.output_logits else None,
        past_key_values=decoding.past,
        logprobs=_columns(logprobs, decoding.sequences) if options.output_logprobs else None,
        finish_reasons=_reasons(decoding.reasons),
    )


def _columns(values: list[Tensor], rows: Tensor) -> Tensor:
    """``[R, S]`` from S columns ``[R]``, of which there may be none."""
    if not values:
        return torch.zeros(len(rows), 0, device=rows.device)
    return torch.stack(values, dim=1)


def _search(decoder: Decoder, request: Request) -> GenerateOutput:
    options, start = request.options, request.prompts.ids.shape[1]
    search = BeamSearch(decoder, request)
    search.run()
    rows = torch.arange(options.num_return_sequences, device=request.prompts.ids.device)
    best = search.done.pick(rows.expand(len(request.prompts.lengths), -1))
    origins = best.origins.flatten(0, 1)
    length = int((origins >= 0).sum(1).max())
    return GenerateOutput(
        sequences=best.sequences.flatten(0, 1)[:, : start + length],
        sequences_scores=best.scores.flatten(),
        scores=tuple(search.scores) if options.output_scores else None,
        logits=tuple(search.logits) if options.output_logits else None,
        beam_indices=origins[:, :length],
        logprobs=best.logprobs.flatten(0, 1)[:, :length] if options.output_logprobs else None,
        finish_reasons=_reasons(best.reasons.flatten()),
    )


def _lines(model: "LanguageModel", request: Request) -> Iterator[Line]:
    served = Served.of(model, request)
    if served is not None:
        begun = False
        try:
            for line in served.lines():
                begun = True
                yield line
            return
        except OutOfMemory as error:
            served.give_up(model, error)
            if begun:
                raise  # the reader has received tokens
        finally:
            served.close()
    yield from Decoding(Decoder(model, request), request).lines()


def _stream(model: "LanguageModel", request: Request) -> Iterator[StreamStep]:
    tokenizer, decoders = request.options.tokenizer, None
    if tokenizer is not None:
        rows = len(request.prompts.lengths) * request.options.num_return_sequences
        decoders = [StreamDecoder(tokenizer) for _ in range(rows)]
    for token_ids, reasons, logprobs in _lines(model, request):
        text = None
        if decoders is not None:
            text = [
                _new_text(decoder, token, reason, request.eos)
                for decoder, token, reason in zip(decoders, token_ids, reasons, strict=True)
            ]
        yield StreamStep(token_ids, text, reasons, logprobs)


def _new_text(
    decoder: StreamDecoder, token: int | None, reason: str | None, eos: Sequence[int]
) -> str:
    """The text that ``token`` completes in its row, which has ended for ``reason``."""
    if token is None:
        return ""
    text = "" if token in eos else decoder.push(token)
    return text if reason is None else text + decoder.flush()
