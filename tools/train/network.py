"""The forward pass used in training: transformers' Qwen3-MoE weights, every expert computed densely.

Owns: the shape of the shipped model and one layer as a pure function, which `torch.compile` compiles once
for all layers. With six experts a dense product whose unused experts are multiplied by zero costs less than
gathering tokens per expert, and it is the same function: `train.py` checks it against transformers' own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SHAPE = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    norm_topk_prob=True,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    rms_norm_eps=1e-6,
    initializer_range=0.02,
    attention_dropout=0.0,
    router_aux_loss_coef=0.01,
    bos_token_id=4093,
    pad_token_id=4093,
    eos_token_id=4095,
)
HEADS, KV_HEADS, HEAD_DIM = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"], SHAPE["head_dim"]
EXPERTS, USED, WIDTH, EPS = SHAPE["num_experts"], SHAPE["num_experts_per_tok"], SHAPE["moe_intermediate_size"], SHAPE["rms_norm_eps"]

# One layer's parameters in the order `layer` takes them.
LAYER_PARAMETERS = [
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "post_attention_layernorm.weight",
    "mlp.gate.weight",
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
]


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def rope_tables(length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    theta = SHAPE["rope_parameters"]["rope_theta"]
    frequency = 1.0 / theta ** (torch.arange(0, HEAD_DIM, 2, device=device, dtype=torch.float32) / HEAD_DIM)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def layer(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, low: torch.dtype, drop: float, *weights: torch.Tensor):
    """One decoder layer on `x` (batch, length, hidden; float32), products in `low`; also the balance loss.

    `drop` is the dropout of both residual branches: the corpus is seen a dozen times.
    """
    attn_norm, wq, wk, wv, wo, q_norm, k_norm, ffn_norm, router, gate_up, down = weights
    batch, length, hidden = x.shape
    h = norm(x, attn_norm).to(low)
    q = F.linear(h, wq.to(low)).view(batch, length, HEADS, HEAD_DIM)
    k = F.linear(h, wk.to(low)).view(batch, length, KV_HEADS, HEAD_DIM)
    v = F.linear(h, wv.to(low)).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
    q = rotate(norm(q, q_norm).transpose(1, 2), cos, sin).to(low)
    k = rotate(norm(k, k_norm).transpose(1, 2), cos, sin).to(low)
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mixed = mixed.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM)
    x = x + F.dropout(F.linear(mixed, wo.to(low)).float(), drop, drop > 0)

    h = norm(x, ffn_norm).view(-1, hidden)
    probability = F.linear(h, router).softmax(-1)
    top, index = probability.topk(USED, dim=-1)
    top = top / top.sum(-1, keepdim=True)
    weight = torch.zeros_like(probability).scatter(-1, index, top)
    both = F.linear(h.to(low), gate_up.to(low).view(EXPERTS * 2 * WIDTH, hidden)).view(-1, EXPERTS, 2 * WIDTH)
    gate, up = both.chunk(2, dim=-1)
    active = (F.silu(gate) * up * weight[:, :, None].to(low)).reshape(-1, EXPERTS * WIDTH)
    stacked = down.to(low).transpose(1, 2).reshape(EXPERTS * WIDTH, hidden)
    x = x + F.dropout((active @ stacked).view(batch, length, hidden).float(), drop, drop > 0)

    # Switch Transformer's balance loss: experts x sum of (share of tokens) x (mean probability).
    share = (weight > 0).float().mean(0)
    return x, EXPERTS * (share * probability.mean(0)).sum()


def head_loss(x: torch.Tensor, final_norm: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor, low: torch.dtype):
    """Mean cross-entropy in nats of the tied head's logits, over the targets that are not -100."""
    logits = F.linear(norm(x, final_norm).to(low), embedding.to(low))
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Network:
    """The parameters of a `Qwen3MoeForCausalLM`, run by the functions above."""

    def __init__(self, model: torch.nn.Module, low: torch.dtype, drop: float = 0.0):
        named = dict(model.named_parameters())
        self.low, self.drop = low, drop
        self.embedding = named["model.embed_tokens.weight"]
        self.final_norm = named["model.norm.weight"]
        count = SHAPE["num_hidden_layers"]
        self.layers = [[named[f"model.layers.{i}.{name}"] for name in LAYER_PARAMETERS] for i in range(count)]
        self.cos, self.sin = rope_tables(SHAPE["max_position_embeddings"], self.embedding.device)
        self.layer, self.head_loss = layer, head_loss

    def compile(self) -> None:
        self.layer = torch.compile(layer, dynamic=False)
        self.head_loss = torch.compile(head_loss, dynamic=False)

    def eager(self) -> None:
        self.layer, self.head_loss = layer, head_loss

    def hidden(self, ids: torch.Tensor):
        x = F.embedding(ids, self.embedding).float()
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        balance = 0.0
        for weights in self.layers:
            x, part = self.layer(x, cos, sin, self.low, self.drop, *weights)
            balance = balance + part
        return x, balance / len(self.layers)

    def losses(self, ids: torch.Tensor, targets: torch.Tensor):
        """(cross-entropy, balance loss) of predicting `targets` from `ids`, both (batch, length)."""
        x, balance = self.hidden(ids)
        return self.head_loss(x, self.final_norm, self.embedding, targets, self.low), balance

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        x, _ = self.hidden(ids)
        return F.linear(norm(x, self.final_norm), self.embedding)
