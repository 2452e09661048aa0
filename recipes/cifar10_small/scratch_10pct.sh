#!/usr/bin/env bash
# The 100 epochs of finetune_10pct.sh without pre-training, for comparison; all layers have the same learning rate.
. "$(dirname "$0")/common.sh"

python main_finetune.py "${classify[@]}" --output_dir "$out/scratch_10pct-seed$seed" "${few_labels[@]}" \
    --layer_decay 1.0 --lr 1e-3 "$@"
keep scratch_10pct
