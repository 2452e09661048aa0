#!/usr/bin/env bash
# Pre-train ViT-T with patches of 2 pixels (12 blocks, 192 wide; decoder 4 x 192) on CIFAR-10 for 400 epochs.
# For one GPU; time is not measured.
. "$(dirname "$0")/common.sh"

python main_pretrain.py "${common[@]}" --output_dir "$out/pretrain-seed$seed" --model mae_vit_tiny_patch16 \
    --norm_pix_loss --mask_ratio 0.75 --crop_scale 0.2 1.0 --batch_size 512 --epochs 400 --warmup_epochs 20 --blr 3e-4 \
    --save_freq 50 --monitor_freq 50 "$@"
keep pretrain
