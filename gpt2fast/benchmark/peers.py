"""The rivals: each loads the same weights and generates greedily, in its strongest setting.

A contender is made with the model's name, loads when it is told to, and then has three duties:

- ``logits(ids)``: float32 ``[T, V]`` after each token of one sequence;
- ``generate(prompt, new, on_token)``: calls ``on_token`` with each of ``new`` tokens at once;
- ``prefill(rows)``: the first new token of each prompt, all of one length.

Everything is imported on loading: where a package is missing, `ImportError` says which.
"""

import json
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from gpt2fast.benchmark import models

OnToken = Callable[[int], None]
Rows = list[list[int]]
Logits = np.ndarray[Any, np.dtype[np.float32]]


class Contender(Protocol):
    """See the module."""

    def prepare(self) -> None:
        """Make the files: before any clock runs."""

    def load(self) -> None: ...

    def logits(self, ids: list[int]) -> Logits: ...

    def generate(self, prompt: list[int], new: int, on_token: OnToken) -> None: ...

    def prefill(self, rows: Rows) -> list[int]: ...


class Streamer:
    """transformers' interface: the prompt comes first, then each step's tokens."""

    def __init__(self, on_token: OnToken) -> None:
        self._on_token, self._prompt = on_token, True

    def put(self, value: Any) -> None:
        if not self._prompt:
            for token in value.tolist():
                self._on_token(token)
        self._prompt = False

    def end(self) -> None:
        pass


class Transformers:
    """``gelu``: the name of an activation; by default the checkpoint's, eight operations."""

    def __init__(self, name: str, threads: int, attention: str, gelu: str | None = None) -> None:
        self._name, self._threads, self._attention = name, threads, attention
        self._options: dict[str, Any] = {} if gelu is None else {"activation_function": gelu}

    def prepare(self) -> None:
        models.checkpoint(self._name)

    def load(self) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(self._threads)
        self._torch = torch
        self._model = transformers.GPT2LMHeadModel.from_pretrained(
            models.checkpoint(self._name), attn_implementation=self._attention, **self._options
        ).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def logits(self, ids: list[int]) -> Logits:
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([ids])).logits[0].numpy()

    def generate(self, prompt: list[int], new: int, on_token: OnToken) -> None:
        ids = self._torch.tensor([prompt])
        self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            streamer=Streamer(on_token),
        )

    def prefill(self, rows: Rows) -> list[int]:
        ids = self._torch.tensor(rows)
        mask = self._torch.ones_like(ids)
        new = self._model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
        return new[:, -1].tolist()


class PytorchPretrainedBert:
    """Version 0.6.2, in the loop of its own example of text generation, without the sampling."""

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._threads = name, threads

    def prepare(self) -> None:
        models.checkpoint(self._name)

    def load(self) -> None:
        import pytorch_pretrained_bert as ppb
        import torch
        from safetensors.torch import load_file

        torch.set_num_threads(self._threads)
        self._torch = torch
        ours = models.config_of(self._name)
        config = ppb.GPT2Config(
            ours.vocab_size,
            n_positions=ours.n_positions,
            n_ctx=ours.n_positions,
            n_embd=ours.n_embd,
            n_layer=ours.n_layer,
            n_head=ours.n_head,
        )
        self._model = ppb.GPT2LMHeadModel(config).eval()
        weights = load_file(models.checkpoint(self._name) / "model.safetensors")
        self._model.load_state_dict(weights, strict=False)

    def logits(self, ids: list[int]) -> Logits:
        with self._torch.no_grad():
            return self._model(self._torch.tensor([ids]))[0][0].numpy()

    def generate(self, prompt: list[int], new: int, on_token: OnToken) -> None:
        ids, past = self._torch.tensor([prompt]), None
        with self._torch.no_grad():
            for _ in range(new):
                logits, past = self._model(ids, past=past)
                ids = logits[:, -1:].argmax(-1)
                on_token(int(ids))

    def prefill(self, rows: Rows) -> list[int]:
        with self._torch.no_grad():
            return self._model(self._torch.tensor(rows))[0][:, -1].argmax(-1).tolist()


class CTranslate2:
    def __init__(self, name: str, threads: int, compute_type: str) -> None:
        self._name, self._threads, self._type = name, threads, compute_type

    def prepare(self) -> None:
        models.ctranslate2(self._name, self._type)

    def load(self) -> None:
        import ctranslate2

        folder = models.ctranslate2(self._name, self._type)
        self._generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=self._type, intra_threads=self._threads
        )
        self._words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def _rows(self, rows: Rows) -> list[list[str]]:
        return [[self._words[token] for token in row] for row in rows]

    def logits(self, ids: list[int]) -> Logits:
        return np.array(self._generator.forward_batch(self._rows([ids])))[0]

    def _run(self, rows: Rows, new: int, **options: Any) -> list[Any]:
        return self._generator.generate_batch(
            self._rows(rows),
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
            **options,
        )

    def generate(self, prompt: list[int], new: int, on_token: OnToken) -> None:
        def callback(step: Any) -> bool:
            on_token(step.token_id)
            return False  # do not stop

        self._run([prompt], new, callback=callback)

    def prefill(self, rows: Rows) -> list[int]:
        return [result.sequences_ids[0][0] for result in self._run(rows, 1)]


class OnnxRuntime:
    """On the graph of `gpt2fast.benchmark.to_onnx`, whose cache is appended to in place."""

    def __init__(self, name: str, threads: int, bits: int) -> None:
        self._name, self._threads, self._bits = name, threads, bits

    def prepare(self) -> None:
        models.onnx(self._name, self._bits)

    def load(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        path = models.onnx(self._name, self._bits) / "model.onnx"
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._of_numpy = onnxruntime.OrtValue.ortvalue_from_numpy
        self._config = models.config_of(self._name)

    def _cache(self, rows: int, capacity: int) -> list[tuple[Any, Any]]:
        c = self._config
        shape = (rows, c.n_head, capacity, c.n_embd // c.n_head)

        def zeros() -> Any:  # a value keeps to the array's memory, so each has one of its own
            return self._of_numpy(np.zeros(shape, np.float32))

        return [(zeros(), zeros()) for _ in range(c.n_layer)]

    def _step(self, ids: Any, start: int, wanted: list[int], cache: list[tuple[Any, Any]]) -> Any:
        rows, time = ids.shape
        binding = self._session.io_binding()
        inputs = {  # in a name of their own: a binding does not keep them alive
            "ids": ids,
            "positions": np.arange(start, start + time)[None].repeat(rows, 0),
            "wanted": np.array(wanted),
            "seqlens": np.full(rows, start + time - 1, np.int32),
            "total": np.array(start + time, np.int32),
        }
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits")
        for i, pair in enumerate(cache):
            for kind, value in zip(("key", "value"), pair, strict=True):
                binding.bind_ortvalue_input(f"past_{kind}{i}", value)
                binding.bind_ortvalue_output(f"{kind}{i}", value)
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    def logits(self, ids: list[int]) -> Logits:
        cache = self._cache(1, len(ids))
        return self._step(np.array([ids]), 0, list(range(len(ids))), cache)[0]

    def generate(self, prompt: list[int], new: int, on_token: OnToken) -> None:
        cache, ids, start = self._cache(1, len(prompt) + new), np.array([prompt]), 0
        for _ in range(new):
            logits = self._step(ids, start, [ids.shape[1] - 1], cache)
            start += ids.shape[1]
            ids = logits[:, -1].argmax(-1)[:, None]
            on_token(int(ids[0, 0]))

    def prefill(self, rows: Rows) -> list[int]:
        ids = np.array(rows)
        time = ids.shape[1]
        return (
            self._step(ids, 0, [time - 1], self._cache(len(rows), time))[:, -1].argmax(-1).tolist()
        )
