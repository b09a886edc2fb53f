#!/usr/bin/env bash
# What is done on a machine with a GPU, one part or several: session.sh PART..
# Needs out/gpu from build.sh. Leaves $OUT/evidence.tar: evidence/ as the repository has it (`tar -xf evidence.tar evidence`
# at its root) and logs/. In brackets seconds on an H200 with 16 cores.
#   tests      every GPU test against the CPU, and each kernel against its twin                        (60)
#   exp        exp, exp2 and SiLU at all 2^32 inputs                                                   (10)
#   full       qwen3_moe_gpu_parity: the full-size shape, three tokens                                 (10)
#   sanitize   compute-sanitizer's four tools on the tiny models, side by side, racecheck by kernels   (60)
#   lost       a GPU that fails in the middle: one line, no hang                                       (10)
#   parity     the full-size shape, CPU against GPU: 3 tokens, 512 tokens, 32 generated                (15)
#   sweep      the full-size shape: lengths, positions, batches, cuts, recordings, repeats             (20)
#   bisect     the full-size shape bisected, without a fault and with the layer-6 story in the kernels (25)
#   faults     every fault in the kernels planted and named; none planted in 50 random models          (60)
#   contracts  the falsifiers of the GPU's contracts, plain and with their faults                      (90)
#   bench      the full-size shape: prompts, depths, batches                                           (90)
#   serve      the full-size shape behind the server: 1 to 64 streams                                  (40)
set -uo pipefail
cd "$(dirname "$0")/../.."
bin=out/gpu model=/dev/shm/qwen3-30b-a3b.gguf
# Everything is gathered here, also by sessions side by side, and goes back as one file: machines may give few back.
out=/dev/shm/tally-session results=${OUT:-out/gpu/results}
logs=$out/logs edited=$out/edited
mkdir -p "$out/evidence" "$logs" "$results"
chmod +x "$bin"/*
# NVRTC, where PyTorch's wheels have it or where the toolkit does.
nvrtc=$(python3 -c 'import nvidia, pathlib; print(next(pathlib.Path(nvidia.__path__[0]).rglob("libnvrtc.so.1*")).parent)' 2>/dev/null)
export LD_LIBRARY_PATH="${nvrtc:-/usr/local/cuda/lib64}:${LD_LIBRARY_PATH:-}"
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-/dev/shm/cache} TALLY_TEST_MODEL=$model

# evidence NAME WHAT [OPTION..] -- COMMAND..: runs it and writes $out/evidence/NAME.json (evidence/README.md).
evidence() { python3 tools/gpu/evidence.py "$out/evidence/$1.json" --what "$2" --tally "$bin/tally" "${@:3}"; }

full_size() { [ -s "$model" ] || { time "$bin/tally" synth qwen3-30b-a3b "$model"; } 2>&1 | tail -n 4; }

# The kernels with a fault in them, in $edited.
edit() { rm -rf "$edited" && "$bin/tally" faults --in-kernels --only "$1" --write "$edited"; }

contract() { timeout 120 "$bin/tally" contract run --device cuda --evidence "$out/evidence/contracts" "$@"; }

contracts() {
    local gpu=FALSIFY-QW3-MOE-GPU sub=FALSIFY-MOE-SUB failed=0
    # What measures the card runs alone; what uses it, side by side.
    contract $gpu-PARITY-001 $gpu-PARITY-002 $gpu-DETERMINISM-001 $sub-001 $sub-002 --model "$model" > "$logs/contracts-1.log" 2>&1 & local a=$!
    contract $gpu-INVARIANTS-001 $gpu-INVARIANTS-002 $gpu-BATCH-001 $gpu-BATCH-002 --model "$model" > "$logs/contracts-2.log" 2>&1 & local b=$!
    contract $gpu-TYPES-001 --model "$model" > "$logs/contracts-3.log" 2>&1 & local c=$!
    contract $sub-003 > "$logs/contracts-4.log" 2>&1 & local d=$!
    contract $gpu-PARITY-001 $gpu-PARITY-002 $gpu-INVARIANTS-001 $gpu-INVARIANTS-002 $gpu-DETERMINISM-001 $gpu-BATCH-001 \
        $gpu-BATCH-002 $gpu-TYPES-001 $sub-001 $sub-003 --planted > "$logs/contracts-5.log" 2>&1 & local e=$!
    for job in $a $b $c $d $e; do wait "$job" || failed=1; done
    contract $gpu-MEMORY-001 $gpu-THROUGHPUT-001 --model "$model" > "$logs/contracts-6.log" 2>&1 || failed=1
    contract $gpu-MEMORY-001 $gpu-THROUGHPUT-001 $sub-002 --planted --model "$model" > "$logs/contracts-7.log" 2>&1 || failed=1
    cat "$logs"/contracts-*.log
    return $failed
}

status=0
for part in "$@"; do
    printf '\n== %s\n' "$part"
    began=$(date +%s)
    case "$part" in
    tests)
        evidence gpu-tests 'every GPU test: bits equal to the CPU, refusals, repeats' -- \
            "$bin/gpu-tests" --ignored --test-threads 4 2>&1 | tee "$logs/tests.log" || status=1
        evidence kernel-tests 'each kernel between the products equals its twin on the CPU' -- \
            "$bin/kernel-tests" --ignored --test-threads 1 2>&1 | tee "$logs/kernel-tests.log" || status=1 ;;
    test:*) "$bin/gpu-tests" --ignored --test-threads 1 "${part#test:}" 2>&1 | tee "$logs/test.log" || status=1 ;;
    exp)
        evidence exp-check 'exp, exp2 and SiLU give the same bits on the GPU at all 2^32 inputs' -- \
            "$bin/exp-tests" --ignored 2>&1 | tee "$logs/exp.log" || status=1 ;;
    full)
        full_size
        evidence qwen3-moe-gpu-parity 'full size, 3 tokens: finite, cosine >= 0.99, all bits equal to the CPU' --model "$model" -- \
            "$bin/full-size-tests" --ignored --nocapture qwen3_moe_gpu_parity 2>&1 | tee "$logs/full.log" || status=1 ;;
    sanitize)
        evidence sanitizer 'compute-sanitizer: memcheck, initcheck and synccheck find nothing, nor racecheck but where it goes down itself (not_looked_at)' -- \
            tools/gpu/sanitize.py "$logs" "$bin/gpu-tests" --ignored --test-threads 1 sanitized || status=1 ;;
    lost)
        evidence gpu-lost 'a GPU that fails in the middle: one line, exit code 1, no hang' -- \
            tools/gpu/lost.py "$bin/tally" || status=1 ;;
    parity)
        full_size
        prompt=$(seq -s, 1000 1511)
        "$bin/tally" parity "$model" --ids 1,2,3 --generate 32 2>&1 | tee "$logs/parity.log" || status=1
        evidence parity-3 'full size, 3 tokens and 32 generated: all bits equal to the CPU' --model "$model" -- \
            "$bin/tally" parity "$model" --ids 1,2,3 --generate 32 --json || status=1
        evidence parity-512 'full size, 512 tokens: all bits equal to the CPU' --model "$model" -- \
            "$bin/tally" parity "$model" --ids "$prompt" --json || status=1 ;;
    sweep)
        full_size
        evidence parity-sweep 'full size: all bits equal over lengths, positions, batches, cuts, graph on and off, repeats' \
            --model "$model" -- "$bin/tally" parity "$model" --sweep --longest 130 --streams 8 --json || status=1 ;;
    bisect)
        full_size
        keep=(--keep outcome,verdict,seconds,finding,skipped,prompt_ids,sides --at-most seconds=15 --model "$model")
        evidence bisect-clean 'full size: six ways of running bisected, no finding, within 15 s after loading' "${keep[@]}" -- \
            "$bin/tally" bisect "$model" --ids 1,2,3,4,5 --json || status=1
        edit kernel-down-read-as-q6-k || status=1
        # Five tokens and their company are few rows, whose kernels are others.
        evidence bisect-story 'full size: ffn_down_exps read with the other type'"'"'s kernel, named within 15 s after loading' \
            "${keep[@]}" --expect-code 3,4 -- \
            "$bin/tally" bisect "$model" --ids 1,2,3,4,5 --kernels "$edited" --json || status=1 ;;
    faults)
        evidence kernel-faults 'every fault in the kernels is named: stage, layer, tensor' -- \
            "$bin/tally" faults --in-kernels --device cuda --json || status=1
        evidence random-models 'no fault: no finding in 50 random models on CPU and GPU, bisected in six ways each' --keep \
            left,right,models,kinds,ways,buffers,seconds,findings -- \
            "$bin/tally" faults --random 50 --device cuda --json || status=1 ;;
    contracts)
        full_size
        contracts || status=1 ;;
    bench)
        full_size
        "$bin/tally" bench "$model" --device cuda 2>&1 | tee "$logs/bench.log" || status=1
        evidence bench-stages 'full size: the time of each stage' --model "$model" -- "$bin/tally" bench "$model" \
            --device cuda --stages --json --prompt 512 --generate 1 --batch 1,8,64 --depth 0,4096 || status=1
        speed() { evidence "bench-$1" "full size: $2" --model "$model" -- "$bin/tally" bench "$model" --device cuda --json "${@:3}"; }
        speed decode 'generation at depths' --prompt 0 --generate 128 --depth 0,4096,32768 || status=1
        speed prompt 'prompts' --prompt 512,4096 --generate 0 --depth 0 || status=1
        speed prompt-deep 'a prompt at a depth' --prompt 2048 --generate 0 --depth 32768 || status=1
        speed batch 'streams generated together' --prompt 0 --generate 64 --batch 1,8,32,64 --depth 0,1024 || status=1 ;;
    serve)
        full_size
        evidence bench-serve 'full size: streams of 512 tokens in, 128 out, over HTTP' --model "$model" -- \
            tools/gpu/serve_speed.py "$bin/tally" "$model" || status=1 ;;
    *) echo "no such part: $part"; exit 2 ;;
    esac
    printf -- '-- %s: %s s\n' "$part" $(($(date +%s) - began))
    # After each part: what is there when time runs out comes back, too.
    flock "$out/lock" tar -cf "$results/evidence.tar" -C "$out" evidence logs
done
exit $status
