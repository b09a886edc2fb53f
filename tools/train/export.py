"""Turns a Qwen3 or Qwen3-MoE state dict into GGUF, and sizes its quantised form.

Owns: tensor names, metadata keys, and the size arithmetic. Knows nothing of training.

    python3 tools/train/export.py CHECKPOINT_DIR tokenizer.json OUT.gguf
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import gguf_file

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NORMAL_TOKEN, CONTROL_TOKEN = 1, 3
FILE_TYPE_F32, FILE_TYPE_F16 = 0, 1

# The suffix in transformers' state dict -> the suffix in GGUF, within one layer.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(state: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """GGUF's tensors in float32. Experts may be fused (`experts.gate_up_proj`, E x 2F x H) or apart."""
    made = {"token_embd.weight": state["model.embed_tokens.weight"]}
    for layer in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        for theirs, ours in LAYER_NAMES.items():
            if (name := f"{source}{theirs}.weight") in state:
                made[f"{target}{ours}.weight"] = state[name]
        experts = f"{source}mlp.experts."
        if f"{experts}gate_up_proj" in state:
            gate, up = np.split(state[f"{experts}gate_up_proj"], 2, axis=1)
            down = state[f"{experts}down_proj"]
        elif f"{experts}0.gate_proj.weight" in state:
            gate, up, down = (
                np.stack([state[f"{experts}{e}.{part}_proj.weight"] for e in range(config["num_experts"])])
                for part in ("gate", "up", "down")
            )
        else:
            continue
        made |= {
            f"{target}ffn_gate_exps.weight": gate,
            f"{target}ffn_up_exps.weight": up,
            f"{target}ffn_down_exps.weight": down,
        }
    made["output_norm.weight"] = state["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        made["output.weight"] = state["lm_head.weight"]
    return {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in made.items()}


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The metadata that describes the network, under llama.cpp's keys."""
    arch = "qwen3moe" if config.get("num_experts") else "qwen3"
    rope = config["rope_parameters"]
    keys: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if arch == "qwen3moe":
        keys |= {
            "expert_count": config["num_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
            "expert_weights_norm": bool(config["norm_topk_prob"]),
        }
    if rope.get("rope_type") == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
        keys |= {f"rope.scaling.yarn_{beta}": float(rope[beta]) for beta in ("beta_fast", "beta_slow") if beta in rope}
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in keys.items()}


def vocabulary(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a byte-level BPE from a `tokenizer.json`."""
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | added
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("the vocabulary's ids have gaps")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    types = np.array([CONTROL_TOKEN if token in added else NORMAL_TOKEN for token in tokens], dtype=np.int32)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.bos_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def halve(made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Matrices as float16; norms and routers stay float32, as every converter keeps them."""
    return {
        name: tensor if tensor.ndim == 1 or "ffn_gate_inp" in name else tensor.astype(np.float16)
        for name, tensor in made.items()
    }


def q4_k_m_bytes(config: dict[str, Any]) -> int:
    """The tensor bytes of the Q4_K_M mix with a tied head; every matrix row is whole blocks of 256."""
    q4, q6 = 144 / 256, 210 / 256
    hidden, layers, experts = config["hidden_size"], config["num_hidden_layers"], config["num_experts"]
    heads, kv, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    width = config["moe_intermediate_size"]
    total = config["vocab_size"] * hidden * q6 + hidden * 4
    for layer in range(layers):
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        total += (2 * heads * dim * hidden + kv * dim * hidden + 2 * experts * width * hidden) * q4
        total += (kv * dim * hidden + experts * width * hidden) * (q6 if more else q4)
        total += (experts * hidden + 2 * hidden + 2 * dim) * 4
    return int(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a folder with model.safetensors and config.json")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    from safetensors.numpy import load_file

    config = json.loads((args.checkpoint / "config.json").read_text())
    made = halve(tensors(load_file(args.checkpoint / "model.safetensors"), config))
    for name, tensor in made.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise ValueError(f"{name} holds a value that float16 cannot")
    words = vocabulary(json.loads(args.tokenizer.read_text()))
    described = architecture(config)
    arch = described.pop("general.architecture")
    metadata = {
        "general.architecture": arch,
        "general.name": "Tally Rust 12M",
        "general.description": "A small Qwen3-MoE trained on the Rust project's sources and documentation",
        "general.license": "MIT OR Apache-2.0",
        "general.file_type": FILE_TYPE_F16,
        **described,
        f"{arch}.vocab_size": config["vocab_size"],
        **words,
    }
    gguf_file.write(args.out, metadata, made)
    overhead = args.out.stat().st_size - sum(tensor.nbytes for tensor in made.values())
    print(f"{args.out}: {args.out.stat().st_size} bytes, {sum(t.size for t in made.values())} parameters")
    print(f"as Q4_K_M: {q4_k_m_bytes(config) + overhead} bytes")


if __name__ == "__main__":
    main()
