"""GPT-2's tokenizer: text to ids and back."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from gpt2fast.tokenizer.base import NO_LIMIT, TokenizerBase, id_list
from gpt2fast.tokenizer.batch import (
    PADDED,
    BatchEncoding,
    check_side,
    pad_rows,
    to_tensors,
    truncate,
)
from gpt2fast.tokenizer.codec import PACKED
from gpt2fast.tokenizer.offsets import Span, encode_with_offsets
from gpt2fast.tokenizer.special import choose, find_first, split_at

_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # what "surrogateescape" makes of such bytes

Special = str | Iterable[str]  # "all", or a set of tokens

_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class GPT2Tokenizer(TokenizerBase):
    """Text to ids and back by byte-level BPE, by default with GPT-2's own vocabulary.

    That vocabulary comes with the package; no network is needed. The names are those of Hugging
    Face's tokenizers.

    Special tokens in a text: ``encode``, ``tokenize`` and ``encode_batch`` take them for ordinary
    text unless ``allowed_special`` names them, as tiktoken does, so that text from outside cannot
    smuggle one in. Calling the tokenizer recognises them, as transformers does; there
    ``split_special_tokens=True`` makes them ordinary. Tokens that ``add_tokens`` added as ordinary
    ones are always recognised. GPT-2 adds no special tokens to a text.

    Surrogates, which UTF-8 has no form for: pairs are joined, lone ones become U+FFFD, as in
    tiktoken. Every other text comes back from ``decode(encode(text))`` as it was.

    A tokenizer may be shared by threads. It remembers what chunks of text encode to, 262,144 of
    them at most; tokenizers with GPT-2's own vocabulary share that memory.

    Args:
        vocab_file: ``vocab.json``; with ``merges_file``, or neither for GPT-2's own vocabulary.
        merges_file: ``merges.txt``.
        errors: what ``decode`` makes of bytes that are not UTF-8, as in ``bytes.decode``.
        unk_token, bos_token, eos_token, pad_token: one that the vocabulary lacks is added to it.
        add_prefix_space: begin each text with a space, unless it begins with one.
        model_max_length: longest input of the model in tokens; longer ones are warned of.
        padding_side, truncation_side: "right" or "left".

    Raises:
        ValueError: a damaged vocabulary, or one file without the other.
    """

    model_input_names = ("input_ids", "attention_mask")
    is_fast = False

    def _recognised(self, allowed_special: Special) -> frozenset[str]:
        ordinary = self._added.keys() - self._special
        return choose(allowed_special, self._special, "allowed_special") | ordinary

    def _with_prefix(self, text: str) -> str:
        if self.add_prefix_space and text and not text.startswith(" "):
            return f" {text}"
        return text

    def _encode(self, text: str, recognised: frozenset[str]) -> array[int]:
        ids: array[int] = array(PACKED)
        for _, part, is_token in split_at(text, recognised):
            if is_token:
                ids.append(self._added[part])
            else:
                ids.extend(self._codec.encode(self._with_prefix(part)))
        return ids

    def _encode_with_offsets(
        self, text: str, recognised: frozenset[str]
    ) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        for start, part, is_token in split_at(text, recognised):
            if is_token:
                ids.append(self._added[part])
                spans.append((start, start + len(part)))
                continue
            prefixed = self._with_prefix(part)
            added = len(prefixed) - len(part)
            part_ids, part_spans = encode_with_offsets(self._codec, prefixed)
            ids += part_ids
            # The prefix has no character of its own; as in transformers it counts to the first.
            spans += [(start + max(a - added, 0), start + max(b - added, 1)) for a, b in part_spans]
        return ids, spans

    def tokenize(self, text: str, *, allowed_special: Special = ()) -> list[str]:
        """The tokens of ``text``, each byte as the character that stands for it."""
        tokens: list[str] = []
        for _, part, is_token in split_at(text, self._recognised(allowed_special)):
            if is_token:
                tokens.append(part)
            else:
                for _, found in self._codec.pieces(self._with_prefix(part)):
                    tokens += found
        return tokens

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        *,
        allowed_special: Special = (),
        disallowed_special: Special = (),
    ) -> Any:
        """The ids of ``text``: a list, or with ``return_tensors`` a tensor ``[1, tokens]``.

        Args:
            text: any string.
            add_special_tokens: without effect; GPT-2 adds none.
            padding, truncation, max_length, return_tensors: as in a call of the tokenizer.
            allowed_special: special tokens to recognise, or "all".
            disallowed_special: special tokens that must not stand in ``text``, or "all", which
                means all that are not allowed.

        Raises:
            ValueError: a disallowed special token in ``text``.
            TypeError: ``text`` is not a string.
        """
        recognised = self._recognised(allowed_special)
        disallowed = choose(disallowed_special, self._special, "disallowed_special")
        found = find_first(_check_text(text), disallowed - recognised)
        if found is not None:
            raise ValueError(
                f"the special token {found!r} stands in the text; allowed_special={{{found!r}}} "
                "recognises it, disallowed_special=() makes it ordinary text"
            )
        row = {"input_ids": [self._encode(text, recognised).tolist()]}
        done = self._finish(
            row, padding, truncation, max_length, return_tensors=return_tensors, masks=False
        )
        return done["input_ids"] if return_tensors else done["input_ids"][0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        num_workers: int = 1,
        allowed_special: Special = (),
    ) -> list[list[int]]:
        """``[self.encode(text) for text in texts]``, in several processes if asked to.

        Args:
            texts: strings.
            num_workers: processes to use, this one included. Each of the others takes about 0.3 s
                to start and remembers nothing of earlier texts: with few cores one is faster.
        """
        from gpt2fast.tokenizer.parallel import encode_parallel

        texts = [_check_text(text) for text in texts]
        encode = partial(self._encode, recognised=self._recognised(allowed_special))
        if num_workers > 1:
            return [ids.tolist() for ids in encode_parallel(encode, texts, num_workers)]
        return [encode(text).tolist() for text in texts]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids that ``decode_bytes`` makes ``data`` of: its text's, and single bytes' between."""
        ids: list[int] = []
        for part in _NOT_UTF8.split(data.decode("utf-8", "surrogateescape")):
            if _NOT_UTF8.match(part):
                ids += self._codec.encode_raw(part.encode("utf-8", "surrogateescape"))
            else:
                ids += self._codec.encode(part)
        return ids

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
        split_special_tokens: bool = False,
    ) -> BatchEncoding:
        """Encode one text or several for a model.

        Args:
            text: a string, or several.
            add_special_tokens: without effect; GPT-2 adds none.
            padding: True or "longest" for the longest of the texts, "max_length" for
                ``max_length``.
            truncation: cut to ``max_length``; by default where that is given without padding.
            max_length: in tokens; by default ``model_max_length``.
            pad_to_multiple_of: pad further, to a multiple of this.
            padding_side: "left" or "right", by default the tokenizer's.
            return_tensors: "pt", "np", or None for lists.
            return_attention_mask: 1 for tokens, 0 for padding.
            return_offsets_mapping: for each token the ``(start, end)`` of its characters.
            split_special_tokens: take special tokens in the text for ordinary text.

        Returns:
            ``input_ids``, ``attention_mask`` and ``offset_mapping``: lists, one for each text; for
            a single text flat, but tensors always are ``[texts, tokens]``, int64.

        Raises:
            ValueError: padding without a pad token, tensors of texts of different lengths,
                truncation to a length that is no multiple of ``pad_to_multiple_of``.
        """
        one = isinstance(text, str)
        texts = [_check_text(item) for item in ([text] if one else text)]
        recognised = self._recognised(() if split_special_tokens else "all")
        rows: dict[str, list[Any]] = {}
        if return_offsets_mapping:
            pairs = [self._encode_with_offsets(item, recognised) for item in texts]
            rows = {
                "input_ids": [ids for ids, _ in pairs],
                "offset_mapping": [spans for _, spans in pairs],
            }
        else:
            rows = {"input_ids": [self._encode(item, recognised).tolist() for item in texts]}
        done = self._finish(
            rows,
            padding,
            truncation,
            max_length,
            pad_to_multiple_of,
            padding_side,
            return_tensors,
            return_attention_mask,
        )
        if one and return_tensors is None:
            return BatchEncoding({name: values[0] for name, values in done.items()})
        return done

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad what calls returned, as the data collators of transformers ask for it.

        Args:
            encoded_inputs: one encoding, of one text or several, or a list of one-text ones.
            (others): as in a call.
        """
        if not isinstance(encoded_inputs, Mapping):
            names = list(encoded_inputs[0]) if encoded_inputs else ["input_ids"]
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in names}
        rows = {name: id_list(values) for name, values in encoded_inputs.items()}
        one = bool(rows["input_ids"]) and isinstance(rows["input_ids"][0], int)
        if one:
            rows = {name: [values] for name, values in rows.items()}
        rows = {k: [id_list(r) for r in v] if k in PADDED else v for k, v in rows.items()}
        done = self._finish(
            rows,
            padding,
            False,
            max_length,
            pad_to_multiple_of,
            padding_side,
            return_tensors,
            return_attention_mask,
        )
        if one and return_tensors is None:
            return BatchEncoding({name: values[0] for name, values in done.items()})
        return done

    def _finish(
        self,
        rows: dict[str, list[Any]],
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        masks: bool = True,
    ) -> BatchEncoding:
        """Truncate, pad and turn into tensors."""
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(
                f"padding must be a bool, 'longest' or 'max_length', found {padding!r}"
            )
        if max_length is not None and max_length < 0:
            raise ValueError(f"max_length must be at least 0, found {max_length}")
        pads = padding not in (False, "do_not_pad")
        if truncation is None:
            truncation = max_length is not None and not pads
        limit = self.model_max_length if max_length is None else max_length
        cuts = truncation not in (False, "do_not_truncate")
        if cuts:
            for name, values in rows.items():
                rows[name] = [truncate(row, limit, self.truncation_side) for row in values]
        lengths = [len(row) for row in rows["input_ids"]]
        longest = max(lengths, default=0)
        if longest > self.model_max_length and max_length is None and not self._warned:
            self._warn_of_length(longest)
            self._warned = True
        if masks and "attention_mask" not in rows:
            rows["attention_mask"] = [[1] * length for length in lengths]
        if pads:
            if self.pad_token_id is None:
                raise ValueError(
                    "padding needs a pad token, and pad_token is None; for GPT-2 usually "
                    "tokenizer.pad_token = tokenizer.eos_token"
                )
            length = longest
            if padding == "max_length":
                if limit >= NO_LIMIT:
                    raise ValueError("padding='max_length' needs max_length, found None")
                length = limit
            if pad_to_multiple_of:
                if cuts and limit < NO_LIMIT and limit % pad_to_multiple_of:
                    raise ValueError(
                        f"truncated to {limit} tokens rows cannot be padded to a multiple of "
                        f"{pad_to_multiple_of}; max_length must be one"
                    )
                length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
            side = check_side("padding_side", padding_side or self.padding_side)
            rows = pad_rows(rows, self.pad_token_id, length, side)
        return to_tensors(rows, return_tensors)

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        *,
        errors: str | None = None,
    ) -> Any:
        """The text of ids; for several lists of ids a list of texts.

        Args:
            token_ids: an id, a list, array or tensor of ids, or several of those.
            skip_special_tokens: leave special tokens out.
            clean_up_tokenization_spaces: remove spaces before punctuation and contractions.
            errors: what becomes of bytes that are not UTF-8, as in ``bytes.decode``; by default
                the tokenizer's ``errors``.

        Raises:
            ValueError: an id outside the vocabulary.
            UnicodeDecodeError: bytes that are not UTF-8, if ``errors`` is "strict".
        """
        ids = id_list(token_ids)
        if ids and (isinstance(ids[0], (list, tuple)) or getattr(ids[0], "ndim", 0) > 0):
            return [
                self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, errors=errors)
                for row in ids
            ]
        text = self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors or self.errors)
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def batch_decode(
        self,
        sequences: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        *,
        errors: str | None = None,
    ) -> list[str]:
        """``decode`` of each of ``sequences``."""
        return [
            self.decode(ids, skip_special_tokens, clean_up_tokenization_spaces, errors=errors)
            for ids in sequences
        ]

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """``text`` without the spaces that some corpora have before punctuation."""
        for spaced in _SPACED:
            text = text.replace(spaced, spaced.strip())
        return text


def _check_text(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"expected a string, found {type(text).__name__}: {text!r:.80}")
    return text
