"""Ours in every mode, and the bare loop that bounds it."""

import time
import warnings
from typing import Any

import numpy as np

from gpt2fast.benchmark import models
from gpt2fast.benchmark.peers import Logits, OnToken, Rows, Streamer


class Ours:
    """Through `generate`, as a user calls it.

    Args:
        mode: "" for float32; "bfloat16"; or what ``quantize=`` takes.
        engine: False keeps `generate` on its general path, by an idle processor of scores.
        compiled: decode by compiled steps, which are compiled before any clock runs.
    """

    def __init__(
        self, name: str, threads: int, mode: str = "", engine: bool = True, compiled: bool = False
    ) -> None:
        self._name, self._threads, self._mode = name, threads, mode
        self._compiled = compiled
        self._options: dict[str, Any] = {"do_sample": False, "eos_token_id": []}
        if not engine:
            self._options["logits_processor"] = [lambda ids, scores: scores]

    def prepare(self) -> None:
        models.checkpoint(self._name)
        if self._quantized:
            models.quantized(self._name, self._mode)
        if self._compiled:
            self.load()

    @property
    def _quantized(self) -> bool:
        return self._mode not in ("", "bfloat16")

    def load(self) -> None:
        import torch

        from gpt2fast import GPT2LMHeadModel

        torch.set_num_threads(self._threads)
        self._torch = torch
        folder = (
            models.quantized(self._name, self._mode)
            if self._quantized
            else models.checkpoint(self._name)
        )
        dtype = "bfloat16" if self._mode == "bfloat16" else None
        self._model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype)
        if self._compiled:
            from gpt2fast import compile_decoding

            with warnings.catch_warnings():
                warnings.simplefilter("error")  # where it does without compiling
                compile_decoding(self._model)

    def logits(self, ids: list[int]) -> Logits:
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([ids])).logits[0].float().numpy()

    def generate(self, prompt: list[int], new: int, on_token: OnToken) -> None:
        ids = self._torch.tensor([prompt])
        self._model.generate(ids, max_new_tokens=new, streamer=Streamer(on_token), **self._options)

    def prefill(self, rows: Rows) -> list[int]:
        ids = self._torch.tensor(rows)
        return self._model.generate(ids, max_new_tokens=1, **self._options)[:, -1].tolist()


def _products(torch: Any, threads: int) -> list[Any]:
    """PyTorch's ways to multiply one row ``[1, K]`` by a weight ``[K, N]``, and add a bias."""

    def by_rows(bias: Any, x: Any, weight: Any) -> Any:
        return torch.addmm(bias, x, weight)

    def by_columns(bias: Any, x: Any, weight: Any) -> Any:
        return torch.addmv(bias, weight.t(), x[0])

    def in_parts(bias: Any, x: Any, weight: Any) -> Any:
        """Each thread multiplies with rows of its own: some libraries use but one for a row."""
        parts = weight.view(threads, -1, weight.shape[1])
        return torch.bmm(x.view(threads, 1, -1), parts).sum(0).add_(bias)

    return [by_rows, by_columns, in_parts]


def _head_products(torch: Any) -> list[Any]:
    """PyTorch's ways to multiply few rows ``[M, C]`` by the head ``[V, C]``."""

    def by_linear(x: Any, weight: Any) -> Any:
        return torch.nn.functional.linear(x, weight)

    def by_onednn(x: Any, weight: Any) -> Any:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return [by_linear, by_onednn] if torch.backends.mkldnn.is_available() else [by_linear]


class BareLoop:
    """The matrix products of a token and nothing else: what a step of float32 costs at least.

    In the checkpoint's layout; for each shape by that of PyTorch's ways which is the fastest here.
    The tokens are no model's.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._threads = name, threads

    def prepare(self) -> None:
        models.checkpoint(self._name)

    def load(self) -> None:
        import torch

        from gpt2fast import GPT2LMHeadModel

        torch.set_num_threads(self._threads)
        self._torch = torch
        model = GPT2LMHeadModel.from_pretrained(models.checkpoint(self._name))
        self._matrices = []
        block: Any
        for block in model.transformer.h:
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                self._matrices.append((layer.bias.detach(), layer.weight.detach()))
        head = model.transformer.wte.weight.detach()
        self._head = head
        width = head.shape[1]
        self._inputs = {n: torch.ones(1, n) for n in (width, 4 * width)}
        shapes = {weight.shape for _, weight in self._matrices}
        self._ways = {shape: self._fastest_layer(shape) for shape in shapes}
        few = {rows: torch.ones(rows, width) for rows in (1, 8)}
        products = _head_products(torch)
        self._head_ways = {n: self._fastest(products, [(x, head)]) for n, x in few.items()}

    def _fastest_layer(self, shape: Any) -> Any:
        x = self._inputs[shape[0]]
        same = [(bias, x, weight) for bias, weight in self._matrices if weight.shape == shape]
        divided = self._threads if shape[0] % self._threads == 0 else 1
        return self._fastest(_products(self._torch, divided), same)

    def _fastest(self, ways: list[Any], cases: list[Any]) -> Any:
        """That of several functions which computes all cases in the least time.

        Each case counts with its shortest run: where others use the processor too, some are
        undisturbed.
        """
        shortest = [[float("inf")] * len(cases) for _ in ways]
        with self._torch.inference_mode():
            for _ in range(6):
                for way, seconds in zip(ways, shortest, strict=True):
                    for i, case in enumerate(cases):
                        start = time.perf_counter()
                        way(*case)
                        seconds[i] = min(seconds[i], time.perf_counter() - start)
        totals = [sum(seconds) for seconds in shortest]
        return ways[totals.index(min(totals))]

    def logits(self, ids: list[int]) -> Logits:
        raise NotImplementedError("the bare loop computes no logits")

    def generate(self, prompt: list[int], new: int, on_token: OnToken) -> None:
        torch = self._torch
        row = self._inputs[self._head.shape[1]]
        with torch.inference_mode():
            for _ in range(new):
                for bias, weight in self._matrices:
                    self._ways[weight.shape](bias, self._inputs[weight.shape[0]], weight)
                self._head_ways[1](row, self._head)
                on_token(0)

    def prefill(self, rows: Rows) -> list[int]:
        """The products of a prompt, its last position's logits included."""
        torch = self._torch
        count = len(rows) * len(rows[0])
        wide = {n: torch.ones(count, n) for n in self._inputs}
        with torch.inference_mode():
            for bias, weight in self._matrices:
                torch.addmm(bias, wide[weight.shape[0]], weight)
            last = wide[self._head.shape[1]][: len(rows)]
            self._head_ways[1 if len(rows) == 1 else 8](last, self._head)
        return [0] * len(rows)


class TorchAlone:
    """Loads PyTorch and nothing else: what every process with it takes of time and memory."""

    def __init__(self, name: str, threads: int) -> None:
        pass

    def prepare(self) -> None:
        pass

    def load(self) -> None:
        import torch  # noqa: F401

    def logits(self, ids: list[int]) -> Logits:
        raise NotImplementedError

    def generate(self, prompt: list[int], new: int, on_token: OnToken) -> None:
        raise NotImplementedError

    def prefill(self, rows: Rows) -> list[int]:
        raise NotImplementedError


def agreement(reference: Logits, other: Logits) -> dict[str, float]:
    """How near ``[T, V]`` logits are to the reference's.

    "error" is the root of the mean squared difference over the reference's standard deviation,
    "largest" the largest difference over the reference's largest value, "argmax" the share of
    positions with the same likeliest token.
    """
    difference = other.astype(np.float64) - reference
    return {
        "error": float(np.sqrt((difference**2).mean()) / reference.std()),
        "largest": float(np.abs(difference).max() / np.abs(reference).max()),
        "argmax": float((reference.argmax(-1) == other.argmax(-1)).mean()),
    }
