#!/usr/bin/env bash
# The 30 epochs of finetune.sh without pre-training, for comparison; all layers have the same learning rate.
. "$(dirname "$0")/common.sh"

python main_finetune.py "${classify[@]}" --output_dir "$out/scratch-seed$seed" "${all_labels[@]}" --layer_decay 1.0 \
    --lr 1e-3 "$@"
keep scratch
