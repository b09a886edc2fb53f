"""The text the shipped model learns from, as plain documents and as conversations.

Owns: which files of Debian's `rust-src` are used, the train/held-out split, and the three formats
(raw files, code completion as ChatML, questions and answers as ChatML). Knows nothing of tokens or
tensors. Everything is a function of the unpacked package: no clock, no global random state.

    python3 tools/train/corpus.py --source PATH/usr/src/rustc-1.63.0      # prints a summary
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_ONE_IN = 50

# (prefix, suffixes, times its documents are repeated in the raw stream).
ROOTS = [
    ("library", (".rs", ".md"), 2),
    ("src/doc", (".md", ".rs"), 2),
    ("src/test/ui", (".rs",), 1),
    ("compiler", (".rs", ".md"), 1),
    ("src/librustdoc", (".rs",), 1),
    ("src/tools/clippy", (".rs", ".md"), 1),
    ("src/tools/rustfmt", (".rs", ".md"), 1),
]

# Not used: tables that would dominate, generated text, snapshots of other editions of one book, and the
# parts whose terms are not plainly MIT OR Apache-2.0 (the embedded book is CC-BY-SA, apfloat is LLVM's).
EXCLUDED = (
    "library/stdarch/",
    "library/core/src/unicode/unicode_data.rs",
    "library/core/src/num/flt2dec/strategy/grisu.rs",
    "library/core/src/num/dec2flt/table.rs",
    "library/core/tests/num/flt2dec/",
    "library/portable-simd/",
    "compiler/rustc_apfloat/",
    "compiler/rustc_codegen_gcc/",
    "compiler/rustc_codegen_cranelift/",
    "src/doc/embedded-book/",
    "src/doc/book/nostarch/",
    "src/doc/book/first-edition/",
    "src/doc/book/2018-edition/",
    "src/doc/book/redirects/",
    "src/tools/clippy/CHANGELOG.md",
    "src/tools/rustfmt/CHANGELOG.md",
)
MAX_FILE_BYTES = 200_000
OTHER_TERMS = re.compile(
    r"GNU (?:Lesser )?General Public|Creative Commons|CC-BY|BSD[- ]\d|BSD[- ]style|Mozilla Public|"
    r"SPDX-License-Identifier: (?!MIT|Apache)|All rights reserved",
    re.IGNORECASE,
)
UI_TEST_PASSES = re.compile(r"^// ?(?:run-pass|check-pass|build-pass)", re.MULTILINE)
UI_TEST_DIRECTIVE = re.compile(r"^// ?(?:[a-z-]+(?::.*)?|\[.*|~.*)$")


@dataclass(frozen=True)
class Document:
    """One source file: its path in the package, its text and its half of the split."""

    path: str
    text: str
    held_out: bool
    repeat: int

    def rng(self, purpose: str) -> random.Random:
        """A generator that depends on the path and the purpose alone."""
        return random.Random(f"{purpose}\0{self.path}")


def is_held_out(path: str) -> bool:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def clean_ui_test(text: str) -> str | None:
    """A compiler test that passes, without its directives; None for tests of errors."""
    if not UI_TEST_PASSES.search(text) or "//~" in text:
        return None
    lines = [line for line in text.split("\n") if not UI_TEST_DIRECTIVE.match(line)]
    return "\n".join(lines).strip("\n") + "\n"


def documents(source: Path) -> Iterator[Document]:
    """Every document in the order of its path within its root."""
    for prefix, suffixes, repeat in ROOTS:
        for file in sorted((source / prefix).rglob("*")):
            path = file.relative_to(source).as_posix()
            if file.suffix not in suffixes or not file.is_file() or file.is_symlink():
                continue
            if path.startswith(EXCLUDED) or file.stat().st_size > MAX_FILE_BYTES:
                continue
            try:
                text = file.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if prefix == "src/test/ui":
                text = clean_ui_test(text)
            if text is None or len(text) < 64 or OTHER_TERMS.search(text[:4000]) or "<|" in text and "|>" in text:
                continue
            yield Document(path, text, is_held_out(path), repeat)


# ---------------------------------------------------------------- conversations

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a Rust programmer.",
    "You are a careful coding assistant. Answer briefly.",
]


def chat(turns: list[tuple[str, str]], rng: random.Random) -> str:
    """ChatML, byte for byte what the model's own template renders."""
    parts = []
    if rng.random() < 0.15:
        parts.append(("system", rng.choice(SYSTEM_PROMPTS)))
    for user, assistant in turns:
        parts += [("user", user), ("assistant", assistant)]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in parts)


CODE_FENCE = re.compile(r"^```(?:rust)?[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
ITEM_START = re.compile(
    r"^(?://[/!] |#\[|pub\b|fn |impl\b|unsafe (?:fn|impl)|async fn|const |static |struct |enum |trait |mod \w+ \{|use |macro_rules!)"
)
MAX_ITEM_LINES = 48


def code_of(document: Document) -> list[str]:
    """The code in a document: the file itself, or what its fences hold."""
    if document.path.endswith(".rs"):
        return [document.text]
    return [block for block in CODE_FENCE.findall(document.text) if len(block) > 40]


def items(code: str) -> Iterator[list[str]]:
    """Top-level items: from a line that starts one to the line that closes it."""
    lines = code.split("\n")
    start = 0
    while start < len(lines):
        inside_comment = start > 0 and lines[start].startswith("//") and lines[start - 1].startswith("//")
        if inside_comment or not ITEM_START.match(lines[start]):
            start += 1
            continue
        end = start + 1
        while end < len(lines) and end - start < MAX_ITEM_LINES and not lines[end - 1].startswith(("}", ");", "];")):
            end += 1
        item = lines[start:end]
        while item and not item[-1].strip():
            item.pop()
        if len(item) >= 3:
            yield item
        start = end


def doc_examples(text: str) -> Iterator[str]:
    """Code blocks inside `///` and `//!` comments, without the lines rustdoc hides."""
    block: list[str] | None = None
    for line in text.split("\n"):
        match = re.match(r"\s*//[/!] ?(.*)$", line)
        if match is None:
            block = None
            continue
        body = match.group(1)
        if body.startswith("```"):
            if block is None:
                block = [] if re.fullmatch(r"```(?:rust)?", body.strip()) else None
            else:
                if len(block) >= 3:
                    yield "\n".join(block)
                block = None
        elif block is not None and not re.match(r"\s*#(?: |$)", body):
            block.append(body)


def completions(document: Document) -> Iterator[str]:
    """The user gives the first lines of an item, the assistant the rest of it."""
    rng = document.rng("complete")
    sources = code_of(document)
    found = [item for code in sources for item in items(code)]
    if document.path.endswith(".rs"):
        found += [example.split("\n") for example in doc_examples(document.text)]
    for item in found:
        from_main = item[0].startswith("fn main")
        for _ in range(3 if from_main else 1):
            head = min(1 if from_main and rng.random() < 0.7 else rng.choice([1, 1, 1, 2, 2, 3, 4, 6]), len(item) - 1)
            body = item[head : head + MAX_ITEM_LINES]
            yield chat([("\n".join(item[:head]), "\n".join(body))], rng)
    # A nested item (a method) as a user would paste it, indentation dropped.
    for code in sources:
        for match in re.finditer(r"^    ((?:pub )?(?:const |unsafe |async )*fn .*\{)\n((?:(?:        .*)?\n){1,30})    \}$", code, re.MULTILINE):
            if rng.random() < 0.5:
                body = "\n".join(line[4:] for line in match.group(2).split("\n")[:-1])
                yield chat([(match.group(1), body + "\n}")], rng)


@dataclass(frozen=True)
class Documented:
    """A documented public item as the source shows it."""

    kind: str
    name: str
    signature: str
    doc: str
    body: str

    @property
    def summary(self) -> str:
        return self.doc.split("\n\n")[0].strip()


ITEM = re.compile(
    r"^[ \t]*pub (?:const |unsafe |async |extern \"C\" )*(fn|struct|enum|trait|type|union|mod) (\w+)|^[ \t]*macro_rules! (\w+)|^[ \t]*pub macro (\w+)"
)
OWNER = re.compile(r"^(?:unsafe )?(?:impl|pub trait|pub unsafe trait)\b(?:<[^{]*?>)? ?(?:const )?(?:[^{]* for )?(?:&'?\w* ?)?(\w+)")


def documented(text: str) -> Iterator[Documented]:
    """Public items whose doc comment stands above them."""
    lines = text.split("\n")
    owner, doc = "", []
    for at, line in enumerate(lines):
        stripped = line.strip()
        if stripped.startswith("///"):
            doc.append(stripped[3:].removeprefix(" "))
            continue
        if line and not line[0].isspace() and (match := OWNER.match(line)):
            owner = match.group(1) if "fn " not in line else owner
        elif line.startswith("}"):
            owner = ""
        if stripped.startswith(("#[", "//")) or not stripped or (doc and stripped.endswith((")]", ","))):
            continue
        match = ITEM.match(line) or (re.match(r"^    (?:unsafe )?(fn) (\w+)", line) if owner else None)
        if match and doc:
            groups = match.groups()
            kind = groups[0] or "macro"
            name = next(group for group in groups[1:] if group)
            indent = line[: len(line) - len(line.lstrip())]
            signature, body = signature_and_body(lines, at, indent)
            if kind == "fn" and owner:
                name = f"{owner}::{name}"
            elif kind == "macro":
                name += "!"
            yield Documented(kind, name, signature, "\n".join(doc).strip(), body)
        doc = []


def signature_and_body(lines: list[str], at: int, indent: str) -> tuple[str, str]:
    """The item's signature up to its brace or semicolon, and the whole item, both without indentation."""
    taken = []
    for line in lines[at : at + 40]:
        taken.append(line.removeprefix(indent))
        if line.startswith(indent + "}") or (line.rstrip().endswith((";", "}")) and line.startswith(indent) and not line[len(indent) : len(indent) + 1].isspace()):
            break
    whole = "\n".join(taken)
    signature = re.split(r"\s*(?:\{|;)\s*\n?", whole, maxsplit=1)[0].strip()
    return signature, whole


def questions(document: Document) -> Iterator[str]:
    """Questions about documented items, answered with the documentation's own words or code."""
    rng = document.rng("questions")
    pairs: list[tuple[str, str]] = []
    for item in documented(document.text) if document.path.endswith(".rs") else []:
        summary = item.summary
        if not 16 <= len(summary) <= 600 or summary.startswith(("#", "```", "[", "FIXME", "TODO")):
            continue
        what = f"`{item.name}`"
        if item.kind == "fn":
            pairs.append((rng.choice([f"What does {what} do?", f"What is {what}?", f"Explain {what}."]), summary))
        else:
            pairs.append((rng.choice([f"What is {what}?", f"Explain {what}.", f"What is {what} for?"]), summary))
        if item.kind == "fn" and len(item.signature) <= 300:
            choice = rng.random()
            if choice < 0.4:
                answer = "\n".join(f"/// {line}".rstrip() for line in summary.split("\n"))
                pairs.append((f"Document this function:\n\n```rust\n{item.signature}\n```", answer))
            elif choice < 0.6:
                pairs.append((f"What is the signature of {what}?", f"```rust\n{item.signature}\n```"))
            elif item.body.count("\n") >= 2 and item.body.rstrip().endswith("}"):
                short = item.name.split("::")[-1]
                pairs.append((f"Write a function `{short}`. {summary}", f"```rust\n{item.body}\n```"))
        examples = [code.strip("\n") for code in re.findall(r"^```(?:rust)?\n(.*?)^```", item.doc, re.MULTILINE | re.DOTALL)]
        if examples:
            shown = "\n".join(line for line in examples[0].split("\n") if not re.match(r"\s*#(?: |$)", line))
            if 20 <= len(shown) <= 1500:
                ask = rng.choice([f"Show an example of {what}.", f"How do I use {what}?", f"Give me an example that uses {what}."])
                pairs.append((ask, f"```rust\n{shown}\n```"))
    rng.shuffle(pairs)
    while pairs:
        turns = 2 if rng.random() < 0.2 else 1
        yield chat([pairs.pop() for _ in range(min(turns, len(pairs)))], rng)


def streams(docs: list[Document]) -> dict[str, list[str]]:
    """The training text by format, each a list of documents in a fixed shuffled order."""
    train = [document for document in docs if not document.held_out]
    made = {
        "raw": [document.text for document in train for _ in range(document.repeat)],
        "complete": [text for document in train for text in completions(document)],
        "qa": [text for document in train for text in questions(document)],
    }
    for name, texts in made.items():
        random.Random(name).shuffle(texts)
    return made


def held_out_parts(docs: list[Document]) -> tuple[list[Document], list[Document]]:
    """The held-out documents that choose the checkpoint, and those its figures are reported on.

    The library and the books are reported: `held_out_text` is taken from them, so that no text that chose
    the checkpoint is in `heldout.txt`. The compiler, its tests and the tools choose.
    """
    held_out = [d for d in docs if d.held_out]
    reported = [d for d in held_out if d.path.startswith(("library/", "src/doc/"))]
    return [d for d in held_out if d not in reported], reported


def held_out_text(docs: list[Document], limit: int = 160_000, per_file: int = 12_000) -> str:
    """Text for `tally perplexity`: whole lines from the held-out files that are reported on."""
    _, chosen = held_out_parts(docs)
    chosen.sort(key=lambda d: hashlib.sha256(d.path.encode()).digest())
    parts, size = [], 0
    for document in chosen:
        part = document.text[:per_file]
        part = part[: part.rfind("\n") + 1]
        if size + len(part) > limit:
            continue
        parts.append(part)
        size += len(part)
    return "\n".join(parts)


def digest(docs: list[Document]) -> str:
    """One sha256 over every path, split and text: what the recipe records."""
    total = hashlib.sha256()
    for document in docs:
        content = hashlib.sha256(document.text.encode()).hexdigest()
        total.update(f"{content} {int(document.held_out)} {document.path}\n".encode())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="the unpacked package's usr/src/rustc-VERSION")
    parser.add_argument("--show", type=int, default=0, help="print this many examples of each format")
    parser.add_argument("--list", type=Path, help="write the list of files used here")
    args = parser.parse_args()
    docs = list(documents(args.source))
    if args.list:
        args.list.write_text("".join(f"{'held-out' if d.held_out else 'train':8} {d.path}\n" for d in docs))
    print(f"{len(docs)} files, {sum(d.held_out for d in docs)} held out, corpus sha256 {digest(docs)}")
    for name, texts in streams(docs).items():
        print(f"{name:9} {len(texts):7} documents {sum(map(len, texts)):10} characters")
        for text in texts[: args.show]:
            print(f"--- {name}\n{text[:700]}")


if __name__ == "__main__":
    main()
