#!/usr/bin/env bash
# The whole training run on a GPU machine, in under ten minutes: train, export, split for the way back.
# Each stage stands alone, so that a late failure keeps what came before.
#   OUT=folder MINUTES=8.1 DATA=out/train bash tools/train/device.sh [train.py's arguments]
# Back here: cat model.gguf.part* > out/tally-rust-f16.gguf
set -u
cd "$(dirname "$0")/../.."
OUT=${OUT:-out/device}
DATA=${DATA:-out/train}
MINUTES=${MINUTES:-8.1}
WORK=$(mktemp -d)
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
mkdir -p "$OUT"
exec > >(tee -a "$OUT/log") 2>&1

# The command's limit is 600 s. Training ends at MINUTES; samples and export get what is left of 570 s.
timeout --signal=INT --kill-after=5 550 \
    python3 tools/train/train.py --data "$DATA" --out "$WORK/checkpoint" --minutes "$MINUTES" "$@"
echo "train: exit $?"
cp "$WORK"/checkpoint/{metrics.json,samples.txt,config.json} "$OUT"/ 2>/dev/null
timeout 40 python3 tools/train/export.py "$WORK/checkpoint" "$DATA/tokenizer.json" "$WORK/model.gguf"
echo "export: exit $?"
if [ -f "$WORK/model.gguf" ]; then
    sha256sum <"$WORK/model.gguf" | cut -d' ' -f1 >"$OUT/model.gguf.sha256"
    split --bytes=15M --numeric-suffixes=0 --suffix-length=1 "$WORK/model.gguf" "$OUT/model.gguf.part"
    ls -l "$OUT"
fi
grep -E "tokens/s|held-out perplexity|against transformers|compile|exit|Q4_K_M" "$OUT/log" | tail -15
