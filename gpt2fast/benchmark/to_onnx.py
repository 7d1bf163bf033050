"""GPT-2 as an ONNX graph with ONNX Runtime's own fused operators.

No exporter writes these: the cache is appended to in place (`GroupQueryAttention`, as in ONNX
Runtime's own runtime of generative models), LayerNorms take their residual, the GELU its bias, and
the head sees the asked-for positions alone.

Inputs: ``ids`` and ``positions`` ``[B, T]``, ``wanted`` ``[W]`` (of the T positions), ``seqlens``
``[B]`` (tokens with the cached ones, less 1), ``total`` (the most), and for each layer a past of
``[B, H, capacity, D]`` for keys and for values. Outputs: ``logits`` ``[B, W, V]`` and the presents,
to be bound to the pasts.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from gpt2fast import GPT2Config


class _Graph:
    """Nodes and initializers, each node with the name of its one useful output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        domain = "com.microsoft" if op in _FUSED else ""
        self.nodes.append(
            helper.make_node(op, inputs, outputs, outputs[0], domain=domain, **attributes)
        )
        return outputs[0]


_FUSED = {"GroupQueryAttention", "SkipLayerNormalization", "FastGelu"}


def _block(graph: _Graph, w: dict[str, str], i: int, x: str, config: GPT2Config) -> str:
    """A block from its normalised input to the residual sum and the second projection's output;
    returns the name of what the next LayerNorm normalises without its residual."""
    h = f"h{i}"
    qkv = graph.node("MatMul", [x, w["attn.c_attn.weight"]], [f"{h}.qkv_"])
    qkv = graph.node("Add", [qkv, w["attn.c_attn.bias"]], [f"{h}.qkv"])
    heads = graph.node(
        "GroupQueryAttention",
        [qkv, "", "", f"past_key{i}", f"past_value{i}", "seqlens", "total"],
        [f"{h}.heads", f"key{i}", f"value{i}"],
        num_heads=config.n_head,
        kv_num_heads=config.n_head,
        do_rotary=0,
    )
    attended = graph.node("MatMul", [heads, w["attn.c_proj.weight"]], [f"{h}.attended"])
    normed = graph.node(
        "SkipLayerNormalization",
        [attended, f"{h}.in", w["ln_2.weight"], w["ln_2.bias"], w["attn.c_proj.bias"]],
        [f"{h}.normed", "", "", f"{h}.middle"],
        epsilon=config.layer_norm_epsilon,
    )
    wide = graph.node("MatMul", [normed, w["mlp.c_fc.weight"]], [f"{h}.wide"])
    wide = graph.node("FastGelu", [wide, w["mlp.c_fc.bias"]], [f"{h}.gelu"])
    return graph.node("MatMul", [wide, w["mlp.c_proj.weight"]], [f"{h}.narrow"])


def build(config: GPT2Config, tensors: dict[str, np.ndarray[Any, Any]]) -> onnx.ModelProto:
    """The graph in float32."""
    graph = _Graph()
    named = {
        name: graph.constant(name, value) for name, value in tensors.items() if "wpe" not in name
    }
    graph.constant("wpe", tensors["transformer.wpe.weight"])
    graph.constant("head", tensors["transformer.wte.weight"].T)
    tokens = graph.node("Gather", ["transformer.wte.weight", "ids"], ["tokens"])
    places = graph.node("Gather", ["wpe", "positions"], ["places"])
    epsilon = config.layer_norm_epsilon
    graph.node("Add", [tokens, places], ["h0.in"])
    first = [f"transformer.h.0.ln_1.{part}" for part in ("weight", "bias")]
    x = graph.node("LayerNormalization", ["h0.in", *first], ["x0"], axis=-1, epsilon=epsilon)
    for i in range(config.n_layer):
        prefix = f"transformer.h.{i}."
        w = {name.removeprefix(prefix): name for name in named if name.startswith(prefix)}
        narrow = _block(graph, w, i, x, config)
        last = i + 1 == config.n_layer
        norm = "transformer.ln_f" if last else f"transformer.h.{i + 1}.ln_1"
        x = graph.node(
            "SkipLayerNormalization",
            [narrow, f"h{i}.middle", f"{norm}.weight", f"{norm}.bias", w["mlp.c_proj.bias"]],
            [f"x{i + 1}", "", "", "" if last else f"h{i + 1}.in"],
            epsilon=epsilon,
        )
    x = graph.node("Gather", [x, "wanted"], ["wanted_x"], axis=1)
    graph.node("MatMul", [x, "head"], ["logits"])
    return _model(graph, config)


def _model(graph: _Graph, config: GPT2Config) -> onnx.ModelProto:
    i64, i32, f32 = TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT
    cache = ["batch", config.n_head, "capacity", config.n_embd // config.n_head]
    pairs = [(f"key{i}", f"value{i}") for i in range(config.n_layer)]
    inputs = [
        helper.make_tensor_value_info("ids", i64, ["batch", "time"]),
        helper.make_tensor_value_info("positions", i64, ["batch", "time"]),
        helper.make_tensor_value_info("wanted", i64, ["wanted"]),
        helper.make_tensor_value_info("seqlens", i32, ["batch"]),
        helper.make_tensor_value_info("total", i32, []),
        *(helper.make_tensor_value_info(f"past_{n}", f32, cache) for pair in pairs for n in pair),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", f32, ["batch", "wanted", config.vocab_size]),
        *(helper.make_tensor_value_info(name, f32, cache) for pair in pairs for name in pair),
    ]
    made = helper.make_graph(graph.nodes, "gpt2", inputs, outputs, graph.constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=9)


def convert(checkpoint: Path, folder: Path, bits: int) -> None:
    """Write ``model.onnx`` of a checkpoint of ours; 8 and 4 bits for the weights of products."""
    config = GPT2Config.from_json_file(checkpoint / "config.json")
    folder.mkdir()
    plain = folder if bits == 32 else folder / "float32"
    plain.mkdir(exist_ok=True)
    onnx.save(
        build(config, load_file(checkpoint / "model.safetensors")),
        str(plain / "model.onnx"),
        save_as_external_data=True,
        location="weights.bin",
    )
    if bits == 32:
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        plain / "model.onnx",
        folder / "model.onnx",
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )
    shutil.rmtree(plain)
