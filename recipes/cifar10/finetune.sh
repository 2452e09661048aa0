#!/usr/bin/env bash
# Fine-tune the encoder of pretrain.sh on CIFAR-10 for 100 epochs, with RandAugment, mixup and cutmix.
# For one GPU; time and accuracy are not measured (aim: at least 85 %, and 12 points above scratch.sh).
. "$(dirname "$0")/common.sh"

python main_finetune.py "${common[@]}" --output_dir "$out/finetune-seed$seed" --nb_classes 10 --model vit_tiny_patch16 \
    --finetune "$out/pretrain-seed$seed/checkpoint-399.pth" \
    --layer_decay 0.75 --crop_pct 1 --crop_scale 0.6 1.0 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --batch_size 256 \
    --epochs 100 --warmup_epochs 5 --blr 5e-4 --drop_path 0.1 --save_freq 10 "$@"
keep finetune
