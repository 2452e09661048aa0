#!/usr/bin/env bash
# The 6 epochs of finetune.sh without pre-training, for comparison; all layers have the same learning rate.
# Takes about 36 minutes on one CPU core. Expected accuracy: 87.0 to 87.2 %.
. "$(dirname "$0")/common.sh"

python main_finetune.py "${classify[@]}" --output_dir "$out/scratch-seed$seed" --layer_decay 1.0 \
    --crop_scale 0.8 1.0 --aa none --reprob 0.25 --smoothing 0.1 --drop_path 0 --batch_size 128 \
    --epochs 6 --warmup_epochs 1 --lr 2e-3 "$@"
keep scratch
