#!/usr/bin/env bash
# Fine-tune all layers of the encoder for 30 epochs.
. "$(dirname "$0")/common.sh"

python main_finetune.py "${classify[@]}" --output_dir "$out/finetune-seed$seed" --finetune "$encoder" \
    "${all_labels[@]}" --layer_decay 0.75 --lr 4e-3 "$@"
keep finetune
