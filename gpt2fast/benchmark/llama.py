"""llama.cpp, by the functions that llama-cpp-python passes on, without its sampling in Python."""

from typing import Any

import numpy as np

from gpt2fast.benchmark import models
from gpt2fast.benchmark.peers import Logits, OnToken, Rows


class LlamaCpp:
    """``kind``: the format of the weights; with F32 keys and values are kept in float32 as well."""

    def __init__(self, name: str, threads: int, kind: str) -> None:
        self._name, self._threads, self._kind = name, threads, kind

    def prepare(self) -> None:
        models.gguf(self._name, self._kind)

    def load(self) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        path = str(models.gguf(self._name, self._kind)).encode()
        self._model = llama_cpp.llama_model_load_from_file(
            path, llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path.decode()}")
        self._config = models.config_of(self._name)
        self._context: Any = None
        self._shape = (0, 0)

    def _fresh(self, rows: int, capacity: int) -> None:
        """An empty context of at least that many positions a row."""
        lib = self._lib
        if self._context is not None and self._shape[0] == rows and self._shape[1] >= capacity:
            lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            lib.llama_free(self._context)
        options = lib.llama_context_default_params()
        options.n_ctx = rows * -(-capacity // 256) * 256
        options.n_batch = options.n_ctx
        options.n_seq_max = rows
        options.n_threads = options.n_threads_batch = self._threads
        if self._kind == "F32":
            options.type_k = options.type_v = lib.GGML_TYPE_F32
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context for {rows} rows of {capacity}")
        self._shape = (rows, capacity)

    def _evaluate(self, rows: Rows, start: int, every: bool = False) -> Logits:
        """Logits ``[W, V]``, of every token or of each row's last."""
        lib, vocab = self._lib, self._config.vocab_size
        count = sum(len(row) for row in rows)
        batch = lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            wanted = []
            i = 0
            for number, row in enumerate(rows):
                for place, token in enumerate(row):
                    batch.token[i] = token
                    batch.pos[i] = start + place
                    batch.n_seq_id[i] = 1
                    batch.seq_id[i][0] = number
                    batch.logits[i] = every or place + 1 == len(row)
                    if batch.logits[i]:
                        wanted.append(i)
                    i += 1
            if status := lib.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode: {status}")
            pointers = (lib.llama_get_logits_ith(self._context, i) for i in wanted)
            return np.stack([np.ctypeslib.as_array(p, (vocab,)) for p in pointers])
        finally:
            lib.llama_batch_free(batch)

    def logits(self, ids: list[int]) -> Logits:
        self._fresh(1, len(ids))
        return self._evaluate([ids], 0, every=True)

    def generate(self, prompt: list[int], new: int, on_token: OnToken) -> None:
        self._fresh(1, len(prompt) + new)
        ids, start = prompt, 0
        for _ in range(new):
            token = int(self._evaluate([ids], start)[0].argmax())
            start += len(ids)
            ids = [token]
            on_token(token)

    def prefill(self, rows: Rows) -> list[int]:
        self._fresh(len(rows), len(rows[0]))
        return self._evaluate(rows, 0).argmax(-1).tolist()
