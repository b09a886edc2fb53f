#!/usr/bin/env bash
# What is done on a machine with a GPU, one part or several: session.sh PART..
# Needs out/gpu from build.sh. Results go to $OUT; $OUT/evidence is what belongs into evidence/.
#   tests     every GPU test against the CPU
#   sanitize  compute-sanitizer's four tools on the tiny models
#   parity    the full-size shape, CPU against GPU: 3 tokens, 512 tokens, 32 generated
#   bench     the full-size shape: prompts, depths, batches
set -uo pipefail
cd "$(dirname "$0")/../.."
bin=out/gpu out=${OUT:-out/gpu/results} model=/dev/shm/qwen3-30b-a3b.gguf
mkdir -p "$out"
chmod +x "$bin"/*
# NVRTC, where PyTorch's wheels have it or where the toolkit does.
nvrtc=$(python3 -c 'import nvidia, pathlib; print(next(pathlib.Path(nvidia.__path__[0]).rglob("libnvrtc.so.1*")).parent)' 2>/dev/null)
export LD_LIBRARY_PATH="${nvrtc:-/usr/local/cuda/lib64}:${LD_LIBRARY_PATH:-}"

# evidence NAME WHAT [--model FILE] -- COMMAND..: runs it and writes $out/evidence/NAME.json (evidence/README.md).
evidence() { python3 tools/gpu/evidence.py "$out/evidence/$1.json" --what "$2" --tally "$bin/tally" "${@:3}"; }

full_size() { [ -s "$model" ] || { time "$bin/tally" synth qwen3-30b-a3b "$model"; } 2>&1 | tail -n 4; }

status=0
for part in "$@"; do
    printf '\n== %s\n' "$part"
    case "$part" in
    tests)
        evidence gpu-tests 'every GPU test: bits equal to the CPU, refusals, repeats' -- \
            "$bin/gpu-tests" --ignored --test-threads 1 2>&1 | tee "$out/tests.log" || status=1 ;;
    test:*) "$bin/gpu-tests" --ignored --test-threads 1 "${part#test:}" 2>&1 | tee "$out/test.log" || status=1 ;;
    sanitize)
        for tool in memcheck racecheck initcheck synccheck; do
            compute-sanitizer --tool "$tool" --error-exitcode 9 "$bin/gpu-tests" --ignored --test-threads 1 sanitized \
                2>&1 | tail -n 5 | tee "$out/$tool.log" || status=1
        done ;;
    parity)
        full_size
        prompt=$(seq -s, 1000 1511)
        "$bin/tally" parity "$model" --ids 1,2,3 --generate 32 2>&1 | tee "$out/parity.log" || status=1
        evidence parity-3 'full size, 3 tokens and 32 generated: all bits equal to the CPU' --model "$model" -- \
            "$bin/tally" parity "$model" --ids 1,2,3 --generate 32 --json || status=1
        evidence parity-512 'full size, 512 tokens: all bits equal to the CPU' --model "$model" -- \
            "$bin/tally" parity "$model" --ids "$prompt" --json || status=1 ;;
    bench)
        full_size
        "$bin/tally" bench "$model" --device cuda 2>&1 | tee "$out/bench.log" || status=1
        evidence bench-stages 'full size: the time of each stage' --model "$model" -- "$bin/tally" bench "$model" \
            --device cuda --stages --json --prompt 512 --generate 1 --batch 1,8,64 --depth 0,4096 || status=1
        speed() { evidence "bench-$1" "full size: $2" --model "$model" -- "$bin/tally" bench "$model" --device cuda --json "${@:3}"; }
        speed decode 'generation at depths' --prompt 0 --generate 128 --depth 0,4096,32768 || status=1
        speed prompt 'prompts' --prompt 512,4096 --generate 0 --depth 0 || status=1
        speed prompt-deep 'a prompt at a depth' --prompt 2048 --generate 0 --depth 32768 || status=1
        speed batch 'streams generated together' --prompt 0 --generate 64 --batch 1,8,32,64 --depth 0,1024 || status=1 ;;
    *) echo "no such part: $part"; exit 2 ;;
    esac
done
exit $status
