# Everything a contributor runs. `just` alone lists it.

default:
    @just --list

# All tests, as the README has it.
test:
    cargo test --workspace --release

# All checks of CI.
check:
    .ci/run

# Text from the model that ships.
run prompt='fn main() {':
    cargo run --release -- run -p '{{prompt}}'

# Speed of a model on this machine, as BENCH.md shows it.
bench model *args:
    cargo run --release -- bench {{model}} --md {{args}}

# The reader of model files under the fuzzer, for ten minutes (fuzz/README.md).
fuzz:
    cd fuzz && RUSTC_BOOTSTRAP=1 cargo fuzz run reader -- -max_total_time=600
