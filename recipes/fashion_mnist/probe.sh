#!/usr/bin/env bash
# Linear probe on the mean of pretrain.sh's patch tokens, 5 epochs.
# About 11 minutes on one CPU core. Expected: 84.7 to 84.9 %.
. "$(dirname "$0")/common.sh"

python main_linprobe.py "${classify[@]}" --output_dir "$out/probe-seed$seed" --finetune "$encoder" --global_pool \
    --blr 8 --crop_scale 0.8 1.0 --batch_size 250 --epochs 5 --warmup_epochs 1 "$@"
keep probe
