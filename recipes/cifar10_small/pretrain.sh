#!/usr/bin/env bash
# Pre-train an encoder of 1.2 M parameters (6 blocks, 128 wide, patches of 4 pixels) on CIFAR-10 for 200 epochs,
# in which it sees 10 M images.
. "$(dirname "$0")/common.sh"

python main_pretrain.py "${common[@]}" --output_dir "$out/pretrain-seed$seed" --model mae_vit_demo_patch4 \
    --norm_pix_loss --mask_ratio 0.75 --crop_scale 0.5 1.0 --batch_size 256 --epochs 200 --warmup_epochs 10 --lr 2e-3 \
    --save_freq 50 --monitor_freq 20 "$@"
keep pretrain
