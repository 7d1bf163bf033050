"""``generate`` and ``stream``: text from a language model, one token after the other.

`generate` holds the two calls and their loop over a checked request; `options` and `prompts` check
it, `decoding` runs the model on the batch, `sampling` chooses tokens, `stopping` ends rows, and
`beams` is the search that keeps several continuations.
"""

from gpt2fast.generation.generate import GenerateOutput, GenerationMixin, StreamStep

__all__ = ["GenerateOutput", "GenerationMixin", "StreamStep"]
