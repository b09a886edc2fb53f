"""Trains the shipped model and writes a transformers checkpoint.

Owns: the optimiser and its schedule, the choice of the step that is kept, evaluation, samples. The rows are
`rows.py`'s and the network is `network.py`'s; its agreement with transformers' own forward is checked before
the first step and after the last.

    python3 tools/train/train.py --data out/train --out out/checkpoint
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from network import SHAPE, Network
from rows import Rows

STARTED = time.monotonic()
CHOSEN_BY = (
    "the least held-out loss over the rows `choose` (the compiler, its tests, the tools) among the evaluated "
    "steps; `report` (the library and the books, where heldout.txt is from) took no part in the choice"
)
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


def schedule(step: int, total: int, peak: float) -> float:
    """Linear warm-up over 2% of the run, then a cosine to a fiftieth of the peak."""
    warm = max(1, min(300, total // 50))
    if step < warm:
        return peak * (step + 1) / warm
    along = min(1.0, (step - warm) / max(1, total - warm))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * along)))


def evaluated(step: int, total: int) -> bool:
    """Whether the held-out rows are evaluated after `step`: seldom at first, often while the rate decays to its end."""
    return step == total or step % (500 if step < 0.6 * total else 100) == 0


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
    total = sum(float(network.losses(part[:, :-1], part[:, 1:])[0]) * len(part) for part in rows.split(batch))
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


def optimiser(model: torch.nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW; the norms' weights do not decay."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.95),
        eps=1e-10,
        fused=parameters[0].is_cuda,
    )


class Training:
    """The model under training: its steps, its held-out losses, and the best parameters so far."""

    def __init__(self, model: torch.nn.Module, rows: Rows, args: argparse.Namespace, low: torch.dtype):
        self.model, self.rows, self.args, self.low = model, rows, args, low
        self.network = Network(model, low, args.dropout)
        self.optimiser = optimiser(model, args.rate, args.decay)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {"choose": math.inf}
        self.best_parameters: list[torch.Tensor] = []

    def step(self, rate: float) -> torch.Tensor:
        """One update; the cross-entropy before it, still on the device."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss, balance = self.network.losses(*self.rows.draw(self.args.batch))
        (loss + SHAPE["router_aux_loss_coef"] * balance).backward()
        size = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        # A step whose gradient is not finite is dropped on the device, without a synchronisation.
        for parameter in self.model.parameters():
            parameter.grad.mul_(torch.isfinite(size)).nan_to_num_(0.0, 0.0, 0.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def hold_out(self, step: int, train_loss: float) -> None:
        """Evaluates both held-out parts, and keeps the parameters if `choose` was never predicted better."""
        losses = {name: evaluate(self.model, self.low, part) for name, part in self.rows.held_out.items()}
        self.history.append({"step": step, "train_loss": train_loss, **losses})
        if losses["choose"] < self.best["choose"]:
            self.best = self.history[-1]
            self.best_parameters = [p.detach().clone() for p in self.model.parameters()]
        say(f"step {step}/{self.args.steps} loss {train_loss:.4f} " + " ".join(f"{k} {v:.4f}" for k, v in losses.items()))

    def restore_best(self) -> None:
        with torch.no_grad():
            for parameter, kept in zip(self.model.parameters(), self.best_parameters):
                parameter.copy_(kept)

    def run(self) -> None:
        """All steps; afterwards the model holds the best parameters."""
        total, saved = self.args.steps, time.monotonic()
        for at in range(1, total + 1):
            loss = self.step(schedule(at - 1, total, self.args.rate))
            if evaluated(at, total):
                self.hold_out(at, float(loss))
                if time.monotonic() - saved > 90:
                    save(self.model, self.args.out)
                    saved = time.monotonic()
        self.restore_best()

    def figures(self) -> dict[str, object]:
        """What `metrics.json` records; losses in nats a token."""
        tokens = self.args.batch * self.args.length
        return {
            "steps": self.args.steps,
            "tokens": self.args.steps * tokens,
            "kept_step": self.best["step"],
            "kept_tokens": self.best["step"] * tokens,
            "chosen_by": CHOSEN_BY,
            "held_out_loss": self.best["report"],
            "held_out_perplexity": math.exp(self.best["report"]),
            "held_out_rows": {name: len(part) for name, part in self.rows.held_out.items()},
            "choose_perplexity": math.exp(self.best["choose"]),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "arguments": {k: v for k, v in vars(self.args).items() if k not in ("data", "out")},
            "history": self.history,
        }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32, help="rows a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row")
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=int, default=120, help="tokens a sample")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    model = build(device, args.seed)
    rows = Rows(args.data, args.length, device, args.seed)
    say(f"{device}, {sum(p.numel() for p in model.parameters())} parameters, held-out rows { {k: len(v) for k, v in rows.held_out.items()} }")
    probe = rows.held_out["report"][:2, :96]
    say(f"against transformers at the start: max |difference in logits| {check_against_transformers(model, probe, device):.2e}")

    training = Training(model, rows, args, low)
    if device.type == "cuda" and not args.no_compile:
        training.network.compile()
    training.run()
    save(model, args.out)
    figures = training.figures()
    say(f"kept step {figures['kept_step']}: held-out perplexity {figures['held_out_perplexity']:.4f}")
    figures["difference_from_transformers"] = check_against_transformers(model, probe, device)
    say(f"against transformers at the end: max |difference in logits| {figures['difference_from_transformers']:.2e}")
    (args.out / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")
    show_samples(Network(model, low), Tokenizer.from_file(str(args.data / "tokenizer.json")), args.out, args.samples)
    say("done")


if __name__ == "__main__":
    main()
