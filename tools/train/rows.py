"""Rows of token ids, and which of their tokens are to be learnt.

Owns: the mix of the streams, where rows start, and the mask of conversations: only what the assistant says,
its `<|im_end|>` included, is a target. Without the mask the model learns to write the user's part too, and
then ends plain code such as `fn main() {` where a user would have stopped. Knows nothing of the network.

    python3 tools/train/rows.py --data out/train      # checks the mask against the text, shows a masked row
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

MIX = {"raw": 0.70, "complete": 0.17, "qa": 0.13}
CHATS = ("complete", "qa")
HELD_OUT = ("choose", "report")
IGNORED = -100  # torch's cross_entropy leaves targets of this value out.
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROLE = "assistant"
OPENING_BLANKS = re.compile(r"^(?: *\n)+")


def spoken(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """True where a token of a stream of ChatML is the assistant's own: after `<|im_start|>assistant` and the
    token with the line feed, up to and including `<|im_end|>`."""
    _, start, end = map(tokenizer.token_to_id, SPECIALS)
    (role,) = tokenizer.encode(ROLE, add_special_tokens=False).ids
    # Whether a token is in an assistant's turn: +1 where its text begins, -1 after its end, summed up.
    turns = np.flatnonzero((ids[:-1] == start) & (ids[1:] == role))
    change = np.zeros(len(ids) + 4, dtype=np.int8)
    change[turns + 3] += 1
    ends = np.flatnonzero(ids == end)
    change[ends[np.searchsorted(ends, turns)] + 1] -= 1
    return np.cumsum(change[: len(ids)], dtype=np.int8).astype(bool)


def whole_rows(ids: np.ndarray, length: int) -> torch.Tensor:
    """A held-out stream cut into rows of `length` + 1 ids; the rest is dropped."""
    count = len(ids) // (length + 1)
    return torch.from_numpy(ids[: count * (length + 1)].astype(np.int64)).view(count, length + 1)


class Rows:
    """Draws training rows from the token streams.

    Half of the plain rows start where a file starts. Rows of conversations always start with one, so that
    each learnt `<|im_end|>` follows an `<|im_start|>` that the model sees.
    """

    def __init__(self, data: Path, length: int, device: torch.device, seed: int):
        arrays = np.load(data / "tokens.npz")
        tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
        end_of_text = tokenizer.token_to_id(SPECIALS[0])
        self.length = length
        self.generator = torch.Generator().manual_seed(seed)
        self.streams, self.learnt, self.starts = {}, {}, {}
        for name in MIX:
            ids = arrays[name]
            learnt = spoken(ids, tokenizer) if name in CHATS else np.ones(len(ids), dtype=bool)
            starts = np.concatenate(([0], np.flatnonzero(ids == end_of_text) + 1))
            starts = starts[starts + length + 1 <= len(ids)]
            self.streams[name] = torch.from_numpy(ids.astype(np.int32)).to(device)
            self.learnt[name] = torch.from_numpy(learnt).to(device)
            self.starts[name] = torch.from_numpy(starts)
        self.held_out = {name: whole_rows(arrays[name], length).to(device) for name in HELD_OUT}
        self.span = torch.arange(length + 1, device=device)
        self.weights = torch.tensor(list(MIX.values()))

    def offsets(self, name: str, count: int) -> torch.Tensor:
        """Where `count` rows of one stream start."""
        stream, starts = self.streams[name], self.starts[name]
        aligned = starts[torch.randint(len(starts), (count,), generator=self.generator)]
        if name in CHATS:
            return aligned
        anywhere = torch.randint(len(stream) - self.length, (count,), generator=self.generator)
        return torch.where(torch.rand(count, generator=self.generator) < 0.5, aligned, anywhere)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` rows: input ids and, for each, the id to predict after it or IGNORED; both (count, length)."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=self.generator)
        inputs, targets = [], []
        for at, name in enumerate(MIX):
            wanted = int((chosen == at).sum())
            if not wanted:
                continue
            places = self.offsets(name, wanted).to(self.span.device, non_blocking=True)[:, None] + self.span
            ids = self.streams[name][places].long()
            inputs.append(ids[:, :-1])
            targets.append(torch.where(self.learnt[name][places], ids, IGNORED)[:, 1:])
        return torch.cat(inputs), torch.cat(targets)


def check_mask(name: str, ids: np.ndarray, tokenizer: Tokenizer) -> None:
    """Compares each conversation's learnt tokens, decoded, with its assistant's turns as its text has them."""
    learnt = spoken(ids, tokenizer)
    ends = np.flatnonzero(ids == tokenizer.token_to_id(SPECIALS[0])) + 1
    straddling = 0
    for first, last in zip(np.concatenate(([0], ends[:-1])), ends):
        part, mask = ids[first:last], learnt[first:last]
        text = tokenizer.decode(part.tolist(), skip_special_tokens=False)
        turns = text.split(f"<|im_start|>{ROLE}\n")[1:]
        wanted = [turn[: turn.index("<|im_end|>") + len("<|im_end|>")] for turn in turns]
        got = tokenizer.decode(part[mask].tolist(), skip_special_tokens=False)
        if got == "".join(wanted):
            continue
        # Of the blank lines that open a turn the first shares a token with the prompt's line feed, and so goes unlearnt.
        if OPENING_BLANKS.sub("", got) != OPENING_BLANKS.sub("", "".join(wanted)) or wanted[0][0] not in " \n":
            raise SystemExit(f"{name}: the mask keeps {got!r} of {text!r}")
        straddling += 1
    print(f"{name}: {len(ends)} conversations, {learnt.mean():.1%} of the tokens learnt, {straddling} with a blank first line")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    arrays = np.load(args.data / "tokens.npz")
    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    for name in CHATS:
        check_mask(name, arrays[name], tokenizer)
    rows = Rows(args.data, 256, torch.device("cpu"), seed=1)
    inputs, targets = rows.draw(32)
    for at in (0, 31):
        print(f"--- row {at}: what is read\n{tokenizer.decode(inputs[at].tolist(), skip_special_tokens=False)}")
        kept = targets[at][targets[at] != IGNORED].tolist()
        print(f"--- row {at}: what is learnt\n{tokenizer.decode(kept, skip_special_tokens=False)}")


if __name__ == "__main__":
    main()
