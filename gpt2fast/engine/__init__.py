"""The decode engine: sequences that join and leave a running batch, one step after the other.

`engine` is what users call, `kept` the engines behind `generate`. A step is planned by `scheduler`
and carried out by `batch` on a runner (`runner` says what that is): `triton_runner` on a GPU,
`torch_runner` elsewhere. `weights` decides which models are served, `sampling` defines how tokens
are chosen, and `speculation` proposes drafts.
"""

from gpt2fast.engine.compiled import compile_decoding
from gpt2fast.engine.engine import Engine
from gpt2fast.engine.kept import release

__all__ = ["Engine", "compile_decoding", "release"]
