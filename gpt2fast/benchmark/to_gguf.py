"""GPT-2 as a file of llama.cpp, written by its own `gguf` package."""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from safetensors.numpy import load_file

from gpt2fast import GPT2Config, GPT2Tokenizer

# Ours -> llama.cpp's; the weights of products are transposed besides.
_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_TOP = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


def _name(name: str) -> str:
    parts = name.removeprefix("transformer.").split(".")
    kind = parts.pop()
    if parts[0] == "h":
        return f"blk.{parts[1]}.{_BLOCK['.'.join(parts[2:])]}.{kind}"
    return f"{_TOP[parts[0]]}.{kind}"


def convert(checkpoint: Path, path: Path, kind: str) -> None:
    """Write a checkpoint of ours; the matrices as ``kind``, what is left in float32."""
    config = GPT2Config.from_json_file(checkpoint / "config.json")
    tokenizer = GPT2Tokenizer()
    writer = GGUFWriter(path, "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    tokens = sorted(tokenizer.encoder, key=tokenizer.encoder.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * len(tokens))
    merges = (checkpoint / "merges.txt").read_text(encoding="utf-8").splitlines()
    writer.add_token_merges([line for line in merges if line and not line.startswith("#version")])
    quantization = GGMLQuantizationType[kind]
    block = GGML_QUANT_SIZES[quantization][0]
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if name.endswith(".weight") and ".h." in name and tensor.ndim == 2:
            tensor = np.ascontiguousarray(tensor.T)
        if tensor.ndim == 2 and "wpe" not in name and tensor.shape[1] % block == 0:
            data = quantize(tensor, quantization)
            writer.add_tensor(_name(name), data, raw_dtype=quantization)
        else:
            writer.add_tensor(_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
