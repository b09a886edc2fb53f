# Everything a contributor runs. `just` alone lists it.

default:
    @just --list

# All tests, as the README has it.
test:
    cargo test --workspace --release

# All checks of CI.
check:
    .ci/run

# The tests that need an NVIDIA GPU, and the full-size model, which is made if it is not there.
gpu-test model='/dev/shm/qwen3-30b-a3b.gguf':
    [ -s '{{model}}' ] || cargo run --release -- synth qwen3-30b-a3b '{{model}}'
    TALLY_TEST_MODEL='{{model}}' cargo test -p cuda --release -- --ignored --test-threads 1 --skip a_little_of_everything

# The GPU's kernels on the CPU, as they stand in crates/cuda/kernels.
emulate *filter:
    TALLY_TEST_KERNELS="{{justfile_directory()}}/crates/cuda/kernels" cargo test -p cuda --release --test emulated -- {{filter}}

# Text from the model that ships.
run prompt='fn main() {':
    cargo run --release -- run -p '{{prompt}}'

# Speed of a model on this machine, as BENCH.md shows it.
bench model *args:
    cargo run --release -- bench {{model}} --md {{args}}

# The reader of model files under the fuzzer, for ten minutes (fuzz/README.md).
fuzz:
    cd fuzz && RUSTC_BOOTSTRAP=1 cargo fuzz run reader -- -max_total_time=600

# The files that the fuzzer starts from, anew.
corpus:
    cargo test -p gguf --release --test hostile -- --ignored

# The README's picture: the type map of Q4_K_M over the 48 layers of 30B-A3B, from narrow ones.
picture:
    cargo run --release -- synth qwen3-30b-a3b out/narrow.gguf --hidden 256 --heads 2 --kv-heads 1 --expert-width 256 --experts 16 --vocab 300
    cargo run --release -- inspect out/narrow.gguf --json | python3 tools/picture/type_map.py > tools/picture/q4_k_m.svg

# The README's pictures of a report, the layer-6 story over 48 layers in Q4_K_M, by Chromium.
screenshots:
    cargo test -p report --release --test browser -- --ignored pictures
    base64 -d target/tmp/story-light.png.base64 > docs/report-light.png
    base64 -d target/tmp/story-dark.png.base64 > docs/report-dark.png

# The README's pictures of the server's page, by Chromium.
serve-screenshots:
    cargo test -p server --release --test page -- --ignored pictures
    base64 -d target/tmp/serve-light.png.base64 > docs/serve-light.png
    base64 -d target/tmp/serve-dark.png.base64 > docs/serve-dark.png

# 64 clients on the server for ten minutes, and whether anything changes under it.
load *args:
    cargo build --release
    python3 tools/load/load.py target/release/tally {{args}}
