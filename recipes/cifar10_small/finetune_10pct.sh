#!/usr/bin/env bash
# Fine-tune all layers of the encoder on a tenth of the labelled images (5,000), for 100 epochs.
. "$(dirname "$0")/common.sh"

python main_finetune.py "${classify[@]}" --output_dir "$out/finetune_10pct-seed$seed" --finetune "$encoder" \
    "${few_labels[@]}" --layer_decay 0.75 --lr 4e-3 "$@"
keep finetune_10pct
