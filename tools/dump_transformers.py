"""Runs a prompt through a Qwen3 or Qwen3-MoE of Hugging Face transformers, and writes every stage as `tally` does.

Owns: which tensor inside transformers is which buffer of which stage. The format is docs/dump-format.md; nothing here
recomputes a value: all that is written is what the model itself held when it ran.

    python3 tools/dump_transformers.py --model PATH --prompt 'fn main() {' --out DIR
    tally bisect model.gguf --ids 1,2,3 --left cpu --right dump:DIR

Needs torch, transformers (5 or later) and safetensors. The model runs in float32 unless --dtype says otherwise, eagerly,
without a cache, in one step. A 30B model in float32 takes 122 GB; --dtype bfloat16 takes half and is told in the
manifest, so that `tally` allows for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Callable

import torch
import transformers
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PRECISIONS = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ATTENTION = "tally_eager"
STEP_FILE = "step-0000.safetensors"


class Capture:
    """What was seen of one step, in the order in which a forward meets it: `blk.6.experts_down.x` to values."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.seen: dict[str, torch.Tensor] = {}

    def keep(self, layer: int | None, stage: str, buffer: str, values: torch.Tensor, *shape: int) -> None:
        name = f"{stage}.{buffer}" if layer is None else f"blk.{layer}.{stage}.{buffer}"
        # float32 holds every value of the shorter types.
        self.seen[name] = values.detach().to(device="cpu", dtype=torch.float32).reshape(self.rows, *shape).clone()


class ExpertProducts(TorchFunctionMode):
    """Sees the products inside a layer's experts, which are no modules: gate and up in one, then down."""

    def __init__(self, note: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            self.note(args[0], out)
        return out


def watch_experts(capture: Capture, layer: int, experts: torch.nn.Module, used: int) -> None:
    """Wraps the experts' forward. It goes through the experts in ascending order, and takes each one's rows by rank, then row."""
    forward = experts.forward

    def watched(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        products: list[tuple[torch.Tensor, torch.Tensor]] = []
        with ExpertProducts(lambda x, out: products.append((x, out))):
            result = forward(hidden, chosen, weights)
        hit = sorted(set(chosen.flatten().tolist()))
        if len(products) != 2 * len(hit):
            raise SystemExit(f"layer {layer}: {len(products)} products for {len(hit)} experts: this transformers is not known")
        kept: dict[str, torch.Tensor] = {}
        for i, expert in enumerate(hit):
            ranks, rows = torch.where((chosen == expert).T)
            gate_up, down = products[2 * i], products[2 * i + 1]
            if not torch.equal(gate_up[0], hidden[rows]):
                raise SystemExit(f"layer {layer}: expert {expert} got other rows: this transformers is not known")
            gate, up = gate_up[1].chunk(2, dim=-1)
            for buffer, values in (("gate", gate), ("up", up), ("hidden", down[0]), ("down", down[1])):
                to = kept.setdefault(buffer, torch.zeros(*chosen.shape, values.shape[-1], dtype=values.dtype))
                to[rows, ranks] = values.detach()
        for buffer in ("gate", "up", "hidden"):
            capture.keep(layer, "experts_up", buffer, kept[buffer], used, kept[buffer].shape[-1])
        capture.keep(layer, "experts_down", "down", kept["down"], used, kept["down"].shape[-1])
        return result

    experts.forward = watched


def watch_router(capture: Capture, layer: int, router: torch.nn.Module) -> None:
    def after(_: Any, __: Any, out: tuple[torch.Tensor, ...]) -> None:
        logits, weights, experts = out
        capture.keep(layer, "route", "router_logits", logits, logits.shape[-1])
        capture.keep(layer, "route", "experts", experts, experts.shape[-1])
        capture.keep(layer, "route", "expert_weights", weights, weights.shape[-1])

    router.register_forward_hook(after)


def watch_dense(capture: Capture, layer: int, mlp: torch.nn.Module) -> None:
    def output(buffer: str) -> Callable[..., None]:
        return lambda _, __, out: capture.keep(layer, "ffn", buffer, out, 1, out.shape[-1])

    mlp.gate_proj.register_forward_hook(output("gate"))
    mlp.up_proj.register_forward_hook(output("up"))
    mlp.down_proj.register_forward_pre_hook(lambda _, args: capture.keep(layer, "ffn", "hidden", args[0], 1, args[0].shape[-1]))
    mlp.down_proj.register_forward_hook(output("down"))


def watch_layer(capture: Capture, layer: int, block: torch.nn.Module, config: Any) -> None:
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, block.self_attn.head_dim
    attention, moe = block.self_attn, hasattr(block.mlp, "experts")

    def projected(buffer: str, count: int) -> Callable[..., None]:
        return lambda _, __, out: capture.keep(layer, "qkv", buffer, out, count, dim)

    attention.q_proj.register_forward_hook(projected("q", heads))
    attention.k_proj.register_forward_hook(projected("k", kv))
    attention.v_proj.register_forward_hook(projected("v", kv))
    attention.o_proj.register_forward_pre_hook(lambda _, args: capture.keep(layer, "attend", "attn", args[0], heads, dim))
    # The feed-forward norm takes the residual stream as attention left it.
    block.post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: capture.keep(layer, "attn_out", "x", args[0], config.hidden_size)
    )
    if moe:
        block.post_attention_layernorm.register_forward_hook(
            lambda _, __, out: capture.keep(layer, "route", "normed", out, config.hidden_size)
        )
        watch_router(capture, layer, block.mlp.gate)
        watch_experts(capture, layer, block.mlp.experts, config.num_experts_per_tok)
    else:
        watch_dense(capture, layer, block.mlp)
    stage = "experts_down" if moe else "ffn"
    block.register_forward_hook(
        lambda _, __, out: capture.keep(layer, stage, "x", out[0] if isinstance(out, tuple) else out, config.hidden_size)
    )


def attention_that_tells(capture: Capture) -> Callable[..., Any]:
    """Eager attention as the model's own module has it, which tells what it was given: rotated queries, keys and values."""

    def attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for buffer, values in (("q", query), ("cache_k", key), ("cache_v", value)):
            # [1, heads, T, HD] to [T, heads, HD]
            capture.keep(module.layer_idx, "rope_store", buffer, values[0].transpose(0, 1), values.shape[1], values.shape[3])
        return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, *args, **kwargs)

    return attend


def run(model: torch.nn.Module, ids: list[int]) -> dict[str, torch.Tensor]:
    """Every buffer of one step over `ids`; the last row's logits."""
    capture, config = Capture(len(ids)), model.config
    if config.model_type not in ("qwen3", "qwen3_moe"):
        raise SystemExit(f"{config.model_type}: only qwen3 and qwen3_moe are known")
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention_that_tells(capture))
    # The mask is made as for eager attention: added to the scores.
    transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, transformers.masking_utils.eager_mask)
    config._attn_implementation = ATTENTION
    if hasattr(config, "num_experts"):
        config._experts_implementation = "eager"
    model.model.embed_tokens.register_forward_hook(lambda _, __, out: capture.keep(None, "embed", "x", out, config.hidden_size))
    for layer, block in enumerate(model.model.layers):
        watch_layer(capture, layer, block, config)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    capture.rows = 1
    capture.keep(None, "head", "logits", logits[-1:], logits.shape[-1])
    return capture.seen


def place(key: str) -> dict[str, Any]:
    """The manifest's way of saying `blk.6.experts_down.x`."""
    *front, stage, buffer = key.split(".")
    layer = {"layer": int(front[1])} if front else {}
    return {"step": 0, **layer, "stage": stage, "buffer": buffer}


# In the order of execution, whatever order the hooks were called in.
ORDER = ["embed", "qkv", "rope_store", "attend", "attn_out", "route", "experts_up", "experts_down", "ffn", "head"]
WITHIN = ["q", "k", "v", "cache_k", "cache_v", "attn", "normed", "router_logits", "experts", "expert_weights", "gate", "up", "hidden", "down", "x", "logits"]


def order(key: str) -> tuple[int, int, int]:
    at = place(key)
    layer = at.get("layer", -1 if at["stage"] == "embed" else 1 << 30)
    return layer, ORDER.index(at["stage"]), WITHIN.index(at["buffer"])


def write(out: Path, seen: dict[str, torch.Tensor], ids: list[int], name: str, dtype: torch.dtype, device: str) -> None:
    """The tensors, and the manifest last: without it, what is half written is no dump."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise SystemExit(f"{out}: not empty; name a new directory")
    keys = sorted(seen, key=order)
    save_file({key: seen[key].contiguous() for key in keys}, out / STEP_FILE)
    (out / STEP_FILE).chmod(0o644)
    manifest = {
        "format": "tally-trace",
        "version": 1,
        "producer": f"dump_transformers.py, transformers {transformers.__version__}, torch {torch.__version__}",
        "model": name,
        "arithmetic": {"rules": "float", "precision": PRECISIONS[dtype]},
        "device": f"transformers ({device})",
        "prompt_ids": ids,
        "steps": [
            {
                "file": STEP_FILE,
                "sha256": hashlib.sha256((out / STEP_FILE).read_bytes()).hexdigest(),
                "tokens": ids,
                "positions": list(range(len(ids))),
                "logits": [len(ids) - 1],
            }
        ],
        "inside": True,
        "entries": [place(key) | {"shape": list(seen[key].shape)} for key in keys],
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{out}: {len(keys)} buffers of {len(ids)} tokens, {(out / STEP_FILE).stat().st_size:,} bytes")
    print(f"--ids {','.join(map(str, ids))}")


def token_ids(text: str) -> list[int]:
    ids = [int(id) for id in text.split(",")]
    if not ids or min(ids) < 0:
        raise argparse.ArgumentTypeError("expected ids such as 1,2,3")
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a directory that transformers can load, or a name on its hub")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text, put through the model's tokenizer without a template")
    prompt.add_argument("--ids", type=token_ids, help="token ids, such as 1,2,3")
    parser.add_argument("--out", required=True, type=Path, help="a new directory")
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, or auto for all there is")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, device_map=args.device).eval()
    ids = args.ids or transformers.AutoTokenizer.from_pretrained(args.model).encode(args.prompt, add_special_tokens=False)
    if max(ids) >= model.config.vocab_size:
        raise SystemExit(f"token {max(ids)} is outside the vocabulary of {model.config.vocab_size}")
    write(args.out, run(model, ids), ids, args.model, dtype, args.device)


if __name__ == "__main__":
    main()
