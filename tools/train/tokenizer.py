"""The shipped model's tokenizer: byte-level BPE with Qwen2's pre-tokenizer, and the encoded corpus.

Owns: the vocabulary, the test vectors, and turning the corpus into token ids so that the training
machine needs neither the text nor the package. Special tokens stand at the end, as in Qwen's files.

    python3 tools/train/tokenizer.py --source PATH/usr/src/rustc-1.63.0
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import corpus

VOCABULARY = 4096
SPECIALS = [corpus.END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

VECTORS = [
    "",
    " ",
    "fn main() {",
    'fn main() {\n    println!("Hello, world!");\n}\n',
    "/// Returns the number of elements in the vector, also referred to as its 'length'.",
    "impl<T: Clone + ?Sized> Option<Box<T>> {",
    "    let x: [u8; 16] = *b\"0123456789abcdef\";",
    "1234567890 3.14159 0xFF_u8 1e-10",
    "don't can't I'M we'Ll they'RE",
    "a  b   c    d     e",
    "\t\tindented\twith\ttabs\n\n\n   \n",
    "trailing spaces   ",
    "   leading spaces",
    "line one\r\nline two\r\n\r\nline four",
    "\n",
    "\n\n \n  \n",
    "caf\u00e9 cafe\u0301",
    "\u212b \ufb01 \u1e9b\u0323",
    "\uac00 \u1100\u1161 \u1112\u1161\u11ab",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002 \u4e2d\u6587",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0393\u03b5\u03b9\u03ac",
    "\U0001f980 rust \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "\u0645\u0631\u062d\u0628\u0627 \u0663\u0664 \u00bd \u2167",
    "zero\u200bwidth\u00a0nbsp\u3000ideographic\u2028separator",
    "#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]\npub struct Point { pub x: i32, pub y: i32 }",
    "match x { Some(v) if v > 0 => v..=9, _ => !0 }?;",
    "<|im_start|>user\nWhat does `Vec::push` do?<|im_end|>\n<|im_start|>assistant\n",
    "end<|endoftext|>start",
    "<|im_start|><|im_start|><|im_end|> <|im_end|>",
    "almost special: <|im_start <|im_end| |endoftext|> <|other|>",
    "https://doc.rust-lang.org/std/vec/struct.Vec.html#method.push?x=1&y=%20",
    "\u0000\u0001\u007f control",
    "'''''''' \"\"\"\" \\\\\\\\ //////// ========",
    "snake_case_name CamelCaseName SCREAMING_CASE kebab-case __dunder__ r#type",
]


def train(texts: list[str]) -> Tokenizer:
    """A byte-level BPE over `texts` in the order given."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    assert [tokenizer.token_to_id(text) for text in SPECIALS] == list(range(VOCABULARY - len(SPECIALS), VOCABULARY))
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The ids of all texts, each ended by <|endoftext|>."""
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    ids: list[np.ndarray] = []
    for at in range(0, len(texts), 512):
        for encoding in tokenizer.encode_batch_fast(texts[at : at + 512], add_special_tokens=False):
            ids.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--source", type=Path, required=True, help="the unpacked package's usr/src/rustc-VERSION")
    parser.add_argument("--out", type=Path, default=root / "out/train", help="where the training machine's input goes")
    parser.add_argument("--models", type=Path, default=root / "models", help="where committed files go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    docs = list(corpus.documents(args.source))
    texts = corpus.streams(docs)
    tokenizer = train(sorted(set(texts["raw"])) + texts["qa"])
    tokenizer.save(str(args.out / "tokenizer.json"))

    for name, part in zip(("choose", "report"), corpus.held_out_parts(docs)):
        texts[name] = [d.text for d in part]
    streams = {name: encode(tokenizer, part) for name, part in texts.items()}
    np.savez_compressed(args.out / "tokens.npz", **streams)
    (args.models / "heldout.txt").write_text(corpus.held_out_text(docs))
    vectors = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids} for text in VECTORS]
    for vector in vectors:
        vector["decoded"] = tokenizer.decode(vector["ids"], skip_special_tokens=False)
    (args.models / "tokenizer_vectors.json").write_text(
        "[\n" + ",\n".join(json.dumps(vector) for vector in vectors) + "\n]\n"
    )
    print(f"corpus sha256 {corpus.digest(docs)}")
    bytes_reported = sum(len(text.encode()) for text in texts["report"])
    print({name: len(ids) for name, ids in streams.items()}, f"reported bytes per token {bytes_reported / len(streams['report']):.3f}")


if __name__ == "__main__":
    main()
