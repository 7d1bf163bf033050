"""PyTorch under `torch.compile`, which takes minutes: transformers, and a loop written for it.

Both decode with a static cache, so that one compiled step of fixed shapes serves every token.
Prompts are evaluated as they are written, for each length would be compiled anew; `prefill`, whose
lengths repeat, is compiled.
"""

from typing import Any

from gpt2fast.benchmark import models
from gpt2fast.benchmark.peers import Logits, OnToken, Rows, Transformers

_ROOM = 256  # positions of a cache are a multiple of it


def _capacity(count: int) -> int:
    return -(-count // _ROOM) * _ROOM


class CompiledTransformers(Transformers):
    """transformers with SDPA, its static cache and a compiled forward pass."""

    def __init__(self, name: str, threads: int) -> None:
        super().__init__(name, threads, "sdpa")

    def load(self) -> None:
        super().load()
        self._compiled = self._torch.compile(self._model.forward, dynamic=False)

    def generate(self, prompt: list[int], new: int, on_token: OnToken) -> None:
        from transformers import StaticCache

        torch = self._torch
        room = min(_capacity(len(prompt) + new), self._model.config.n_positions)
        cache = StaticCache(config=self._model.config, max_cache_len=room)
        with torch.inference_mode():
            ids, place = torch.tensor([prompt]), torch.arange(len(prompt))[None]
            run = self._model.forward
            for i in range(new):
                out = run(ids, past_key_values=cache, position_ids=place, logits_to_keep=1)
                ids = out.logits[:, -1].argmax(-1, keepdim=True)
                on_token(int(ids))
                place = torch.tensor([[len(prompt) + i]])
                run = self._compiled

    def prefill(self, rows: Rows) -> list[int]:
        with self._torch.inference_mode():
            out = self._compiled(self._torch.tensor(rows), use_cache=False, logits_to_keep=1)
            tokens: list[int] = out.logits[:, -1].argmax(-1).tolist()
            return tokens


class CompiledLoop:
    """GPT-2 in the style of nanoGPT: linear layers, SDPA, one function for the compiler.

    Weights ``[out, in]``; a cache ``[2, B, H, capacity, D]`` a layer.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._threads = name, threads

    def prepare(self) -> None:
        models.checkpoint(self._name)

    def load(self) -> None:
        import torch
        from safetensors.torch import load_file

        torch.set_num_threads(self._threads)
        self._torch = torch
        self._config = models.config_of(self._name)
        tensors = load_file(models.checkpoint(self._name) / "model.safetensors")
        self._weights = {
            name.removeprefix("transformer."): tensor.t().contiguous()
            if tensor.ndim == 2 and ".h." in name
            else tensor
            for name, tensor in tensors.items()
        }
        self._compiled = torch.compile(self._forward, dynamic=False)

    def _forward(self, w: Any, caches: Any, ids: Any, places: Any, mask: Any, last: bool) -> Any:
        """Logits of ids ``[B, T]`` at ``places`` ``[T]``, of the last one or of all.

        ``mask`` ``[T, capacity]`` is true where a token sees a key.
        """
        functional = self._torch.nn.functional
        c = self._config

        def norm(x: Any, name: str) -> Any:
            gain, bias = w[f"{name}.weight"], w[f"{name}.bias"]
            return functional.layer_norm(x, (c.n_embd,), gain, bias, c.layer_norm_epsilon)

        def linear(x: Any, name: str) -> Any:
            return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

        x = w["wte.weight"][ids] + w["wpe.weight"][places]
        for i, cache in enumerate(caches):
            h = f"h.{i}"
            qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn")
            q, k, v = (
                part.unflatten(-1, (c.n_head, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
            )
            cache[0].index_copy_(2, places, k)
            cache[1].index_copy_(2, places, v)
            heads = functional.scaled_dot_product_attention(q, cache[0], cache[1], mask)
            x = x + linear(heads.transpose(1, 2).flatten(2), f"{h}.attn.c_proj")
            wide = functional.gelu(
                linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate="tanh"
            )
            x = x + linear(wide, f"{h}.mlp.c_proj")
        x = norm(x[:, -1:] if last else x, "ln_f")
        return functional.linear(x, w["wte.weight"])

    def _empty(self, rows: int, capacity: int) -> list[Any]:
        c = self._config
        shape = (2, rows, c.n_head, capacity, c.n_embd // c.n_head)
        return [self._torch.zeros(shape) for _ in range(c.n_layer)]

    def _run(self, run: Any, caches: Any, rows: Rows, start: int, last: bool = True) -> Any:
        torch = self._torch
        places = torch.arange(start, start + len(rows[0]))
        mask = torch.arange(caches[0].shape[3]) <= places[:, None]
        with torch.inference_mode():
            return run(self._weights, caches, torch.tensor(rows), places, mask, last)

    def logits(self, ids: list[int]) -> Logits:
        caches = self._empty(1, len(ids))
        logits: Logits = self._run(self._forward, caches, [ids], 0, last=False)[0].numpy()
        return logits

    def generate(self, prompt: list[int], new: int, on_token: OnToken) -> None:
        caches = self._empty(1, _capacity(len(prompt) + new))
        run, ids, start = self._forward, prompt, 0
        for _ in range(new):
            token = int(self._run(run, caches, [ids], start).argmax())
            on_token(token)
            start += len(ids)
            run, ids = self._compiled, [token]

    def prefill(self, rows: Rows) -> list[int]:
        caches = self._empty(len(rows), len(rows[0]))
        tokens: list[int] = self._run(self._compiled, caches, rows, 0)[:, -1].argmax(-1).tolist()
        return tokens
