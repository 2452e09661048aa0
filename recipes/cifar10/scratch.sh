#!/usr/bin/env bash
# The 100 epochs of finetune.sh without pre-training, for comparison.
# For one GPU; time and accuracy are not measured.
. "$(dirname "$0")/common.sh"

python main_finetune.py "${common[@]}" --output_dir "$out/scratch-seed$seed" --nb_classes 10 --model vit_tiny_patch16 \
    --layer_decay 1.0 --crop_pct 1 --crop_scale 0.6 1.0 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --batch_size 256 \
    --epochs 100 --warmup_epochs 5 --blr 1e-3 --save_freq 10 "$@"
keep scratch
