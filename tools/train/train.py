"""Trains the shipped model within a budget of minutes and writes a transformers checkpoint.

Owns: sampling of rows, the optimiser and its schedule, evaluation, samples. The network is `network.py`'s;
its agreement with transformers' own forward is checked before the first step and after the last.

    python3 tools/train/train.py --data out/train --out out/checkpoint --minutes 8
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from network import SHAPE, Network

STARTED = time.monotonic()
MIX = {"raw": 0.70, "complete": 0.17, "qa": 0.13}
SAMPLE_PROMPTS = [
    "fn main() {",
    "/// Returns the number of elements in the vector",
    "impl<T> Option<T> {",
    "use std::collections::HashMap;\n",
    "What does `Vec::push` do?",
    "Show an example of `Option::map`.",
]


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


class Rows:
    """Training rows: slices of the token streams, half of them starting where a document starts."""

    def __init__(self, data: Path, length: int, device: torch.device, seed: int):
        arrays = np.load(data / "tokens.npz")
        self.length = length
        self.generator = torch.Generator().manual_seed(seed)
        self.streams, self.starts = {}, {}
        end_of_text = SHAPE["bos_token_id"]
        for name in MIX:
            ids = arrays[name]
            starts = np.concatenate(([0], np.flatnonzero(ids == end_of_text) + 1))
            starts = starts[starts + length + 1 <= len(ids)]
            self.streams[name] = torch.from_numpy(ids.astype(np.int32)).to(device)
            self.starts[name] = torch.from_numpy(starts)
        held_out = arrays["held_out"]
        rows = len(held_out) // (length + 1)
        self.held_out = torch.from_numpy(held_out[: rows * (length + 1)].astype(np.int64)).view(rows, length + 1).to(device)
        self.span = torch.arange(length + 1, device=device)
        self.weights = torch.tensor(list(MIX.values()))

    def draw(self, count: int) -> torch.Tensor:
        """`count` rows of length + 1 ids."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=self.generator)
        parts = []
        for at, name in enumerate(MIX):
            wanted = int((chosen == at).sum())
            if not wanted:
                continue
            stream, starts = self.streams[name], self.starts[name]
            anywhere = torch.randint(len(stream) - self.length, (wanted,), generator=self.generator)
            aligned = starts[torch.randint(len(starts), (wanted,), generator=self.generator)]
            take_aligned = torch.rand(wanted, generator=self.generator) < 0.5
            offsets = torch.where(take_aligned, aligned, anywhere).to(stream.device, non_blocking=True)
            parts.append(stream[offsets[:, None] + self.span])
        return torch.cat(parts).long()


def schedule(step: int, total: int, peak: float) -> float:
    """Linear warm-up over 2% of the run, then a cosine to a fiftieth of the peak."""
    warm = max(1, min(300, total // 50))
    if step < warm:
        return peak * (step + 1) / warm
    along = min(1.0, (step - warm) / max(1, total - warm))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * along)))


def build(device: torch.device, seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE)).float().to(device)
    model.set_experts_implementation("eager")  # The plain loop: grouped products on a GPU are not float32.
    residual = 1 / math.sqrt(2 * SHAPE["num_hidden_layers"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, SHAPE["initializer_range"])
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.mul_(residual)
    return model


def check_against_transformers(model: torch.nn.Module, ids: torch.Tensor, device: torch.device) -> float:
    """The largest difference in logits between `network.py` in float32 and transformers' own forward."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        ours = Network(model, torch.float32).logits(ids)
        theirs = model(input_ids=ids).logits.float()
    torch.set_float32_matmul_precision(before)
    return float((ours - theirs).abs().max())


@torch.no_grad()
def evaluate(model: torch.nn.Module, low: torch.dtype, rows: torch.Tensor, batch: int = 16) -> float:
    """Held-out cross-entropy in nats a token, not compiled and without dropout."""
    network = Network(model, low)
    total = sum(float(network.losses(part)[0]) * len(part) for part in rows.split(batch))
    return total / len(rows)


@torch.no_grad()
def generate(network: Network, ids: list[int], count: int, temperature: float, seed: int) -> list[int]:
    """Up to `count` tokens after `ids`; greedy at temperature 0. Recomputes the prefix at each step."""
    device = network.embedding.device
    generator = torch.Generator().manual_seed(seed)
    made: list[int] = []
    for _ in range(count):
        logits = network.logits(torch.tensor([ids + made], device=device))[0, -1].float().cpu()
        if temperature:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        made.append(token)
        if token in (SHAPE["eos_token_id"], SHAPE["bos_token_id"]):
            break
    return made


def show_samples(network: Network, tokenizer: Tokenizer, out: Path, count: int) -> None:
    network.eager()
    lines = []
    for prompt, as_chat, temperature in itertools.product(SAMPLE_PROMPTS, (False, True), (0.0, 0.8)):
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" if as_chat else prompt
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        made = tokenizer.decode(generate(network, ids, count, temperature, seed=1), skip_special_tokens=False)
        lines.append(f"=== {'chat' if as_chat else 'raw'} T={temperature} {prompt!r}\n{made}\n")
        print(lines[-1], flush=True)
    (out / "samples.txt").write_text("\n".join(lines))


def save(model: torch.nn.Module, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().float().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(state, out / "model.safetensors.part")
    (out / "model.safetensors.part").replace(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(SHAPE, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="from the start of this program to the last step")
    parser.add_argument("--steps", type=int, default=0, help="this many steps instead of a fit to the minutes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-out-rows", type=int, default=96, help="rows of each held-out evaluation")
    parser.add_argument("--samples", type=int, default=120, help="tokens a sample")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    model = build(device, args.seed)
    rows = Rows(args.data, args.length, device, args.seed)
    rows.held_out = rows.held_out[: args.held_out_rows]
    say(f"{device}, {sum(p.numel() for p in model.parameters())} parameters, held-out rows {len(rows.held_out)}")
    probe = rows.held_out[:2, :96]
    try:
        say(f"against transformers at the start: max |difference in logits| {check_against_transformers(model, probe, device):.2e}")
    except Exception as error:  # The check must not cost the run: it is repeated at the end and reported.
        say(f"the check against transformers failed to run: {error!r}")

    network = Network(model, low, args.dropout)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=args.rate,
        betas=(0.9, 0.95),
        eps=1e-10,
        fused=device.type == "cuda",
    )

    def step(rate: float) -> torch.Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, balance = network.losses(rows.draw(args.batch))
        (loss + SHAPE["router_aux_loss_coef"] * balance).backward()
        size = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # A step whose gradient is not finite is dropped on the device, without a synchronisation.
        for parameter in model.parameters():
            parameter.grad.mul_(torch.isfinite(size)).nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack((loss.detach(), balance.detach()))

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    if device.type == "cuda" and not args.no_compile:
        network.compile()
        try:
            step(0.0)
            settle()
            say("compiled")
        except Exception as error:
            say(f"torch.compile failed, going on without it: {str(error)[:2000]}")
            optimizer.zero_grad(set_to_none=True)
            network.eager()

    total = args.steps
    measure_from, measured_over = 10, 40
    history, best, best_state, at = [], float("inf"), [], 0
    last_saved = time.monotonic()
    deadline = STARTED + args.minutes * 60
    while total == 0 or at < total:
        latest = step(schedule(at, total or 10_000, args.rate))
        at += 1
        if at == measure_from:
            settle()
            began = time.monotonic()
        if total == 0 and at == measure_from + measured_over:
            settle()
            now = time.monotonic()
            seconds = (now - began) / measured_over
            total = at + max(1, int(0.96 * (deadline - now) / seconds))
            say(f"{1000 * seconds:.1f} ms a step, {args.batch * args.length / seconds:.0f} tokens/s, {total} steps in all")
        if at % 100 == 0 or at == total:
            loss, balance = latest.tolist()
            if at % 500 == 0 or at == total:
                held_out = evaluate(model, low, rows.held_out)
                if held_out < best:
                    best, best_state = held_out, [p.detach().clone() for p in model.parameters()]
                history.append({"step": at, "train_loss": loss, "held_out_loss": held_out})
                say(f"step {at}/{total} loss {loss:.4f} balance {balance:.3f} held-out {held_out:.4f} perplexity {math.exp(held_out):.3f}")
            elif at % 200 == 0:
                say(f"step {at}/{total} loss {loss:.4f} balance {balance:.3f}")
            if time.monotonic() - last_saved > 90:
                save(model, args.out)
                last_saved = time.monotonic()
            if time.monotonic() > deadline + 5:
                say("out of time before the last step")
                break
    settle()
    if best_state:
        with torch.no_grad():
            for parameter, kept in zip(model.parameters(), best_state):
                parameter.copy_(kept)
    save(model, args.out)
    held_out = evaluate(model, low, rows.held_out)
    figures = {
        "steps": at,
        "tokens": at * args.batch * args.length,
        "held_out_loss": held_out,
        "held_out_perplexity": math.exp(held_out),
        "last_held_out_loss": history[-1]["held_out_loss"] if history else held_out,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "history": history,
    }
    say(f"held-out perplexity {math.exp(held_out):.4f} after {at} steps")
    (args.out / "metrics.json").write_text(json.dumps(figures, indent=1))
    try:
        figures["difference_from_transformers"] = check_against_transformers(model, probe, device)
        say(f"against transformers at the end: max |difference in logits| {figures['difference_from_transformers']:.2e}")
        (args.out / "metrics.json").write_text(json.dumps(figures, indent=1))
    except Exception as error:  # As above.
        say(f"the check against transformers failed to run: {error!r}")
    show_samples(Network(model, low), Tokenizer.from_file(str(args.data / "tokenizer.json")), args.out, args.samples)
    say("done")


if __name__ == "__main__":
    main()
