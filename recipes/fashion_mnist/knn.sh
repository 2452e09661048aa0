#!/usr/bin/env bash
# Classify by the 20 nearest of the 60,000 training images, weighted, in the mean of pretrain.sh's patch tokens.
# Takes 2 minutes on one CPU core. Expected accuracy: 86.3 to 86.6 %.
. "$(dirname "$0")/common.sh"

mkdir -p "$out/knn-seed$seed"
python main_features.py --resume "$encoder" --data_path "$data/val" --neighbours "$data/train" --crop_pct 1 \
    --batch_size 250 --output "$out/knn-seed$seed/features.npz" "$@" | tee "$out/knn-seed$seed/out.txt"
# The printed accuracy becomes a log in the form of the other rows'.
sed -n 's/^k-NN.*: \([0-9.]*\) %$/{"test_acc1": \1}/p' "$out/knn-seed$seed/out.txt" > "$out/knn-seed$seed/log.txt"
keep knn
