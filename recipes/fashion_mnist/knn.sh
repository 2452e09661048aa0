#!/usr/bin/env bash
# 20 weighted nearest neighbours among the 60,000 training images, in the mean of the patch tokens.
# 2 minutes on one CPU core. Expected: 86.3 to 86.6 %.
. "$(dirname "$0")/common.sh"

mkdir -p "$out/knn-seed$seed"
python main_features.py --resume "$encoder" --data_path "$data/val" --neighbours "$data/train" --crop_pct 1 \
    --batch_size 250 --output "$out/knn-seed$seed/features.npz" "$@" | tee "$out/knn-seed$seed/out.txt"
sed -n 's/^k-NN.*: \([0-9.]*\) %$/{"test_acc1": \1}/p' "$out/knn-seed$seed/out.txt" > "$out/knn-seed$seed/log.txt"
keep knn
