#!/usr/bin/env bash
# Builds what a machine with a GPU but without Rust needs, into out/gpu: `tally` and the tests that need a GPU, stripped.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p out/gpu
cargo build --release --locked -p tally
strip -o out/gpu/tally target/release/tally
# The library's tests are those of single kernels; the others are files in crates/cuda/tests.
cargo test --release --locked -p cuda --lib --test gpu --test exp --test full_size --no-run --message-format json \
    | python3 -c '
import json, sys
for message in map(json.loads, sys.stdin):
    if message.get("executable") and message["profile"]["test"]:
        name = message["target"]["name"]
        print("kernel" if name == "cuda" else name.replace("_", "-"), message["executable"])' \
    | while read -r name program; do strip -o "out/gpu/$name-tests" "$program"; done
ls -l out/gpu
