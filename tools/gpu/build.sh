#!/usr/bin/env bash
# Builds what a machine with a GPU but without Rust needs, into out/gpu: `tally` and the GPU tests, stripped.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p out/gpu
cargo build --release --locked -p tally
tests=$(cargo test --release --locked -p cuda --test gpu --no-run --message-format json \
    | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
strip -o out/gpu/tally target/release/tally
strip -o out/gpu/gpu-tests "$tests"
ls -l out/gpu
