#!/usr/bin/env bash
# The whole training run on a GPU machine, in under five minutes on an H200: train, export, split for the way back.
# Each stage stands alone, so that a late failure keeps what came before.
#   OUT=folder DATA=out/train bash tools/train/device.sh [train.py's arguments]
# Back here: cat model.gguf.part* > out/tally-rust-f16.gguf
set -u
cd "$(dirname "$0")/../.."
OUT=${OUT:-out/device}
DATA=${DATA:-out/train}
WORK=$(mktemp -d)
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
mkdir -p "$OUT"
exec > >(tee -a "$OUT/log") 2>&1

python3 tools/train/train.py --data "$DATA" --out "$WORK/checkpoint" "$@"
echo "train: exit $?"
cp "$WORK"/checkpoint/{metrics.json,samples.txt,config.json} "$OUT"/ 2>/dev/null
python3 tools/train/export.py "$WORK/checkpoint" "$DATA/tokenizer.json" "$WORK/model.gguf"
echo "export: exit $?"
if [ -f "$WORK/model.gguf" ]; then
    sha256sum <"$WORK/model.gguf" | cut -d' ' -f1 >"$OUT/model.gguf.sha256"
    split --bytes=15M --numeric-suffixes=0 --suffix-length=1 "$WORK/model.gguf" "$OUT/model.gguf.part"
    ls -l "$OUT"
fi
