#!/usr/bin/env bash
# Train an attentive probe on the encoder of pretrain.sh for 5 epochs: a learned query pools the patch tokens.
# Takes about 12 minutes on one CPU core. Expected accuracy: 89.0 to 89.5 %.
. "$(dirname "$0")/common.sh"

python main_linprobe.py "${classify[@]}" --output_dir "$out/attentive-seed$seed" --finetune "$encoder" \
    --probe attentive --lr 3e-3 --crop_scale 0.8 1.0 --batch_size 250 --epochs 5 --warmup_epochs 1 "$@"
keep attentive
