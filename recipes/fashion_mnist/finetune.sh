#!/usr/bin/env bash
# Fine-tune all layers of the encoder of pretrain.sh for 6 epochs.
# Takes about 33 minutes on one CPU core. Expected accuracy: 92 %.
. "$(dirname "$0")/common.sh"

python main_finetune.py "${classify[@]}" --output_dir "$out/finetune-seed$seed" --finetune "$encoder" \
    --layer_decay 0.75 --crop_scale 0.8 1.0 --aa none --reprob 0.25 --smoothing 0.1 --drop_path 0 --batch_size 128 \
    --epochs 6 --warmup_epochs 1 --lr 2e-3 "$@"
keep finetune
