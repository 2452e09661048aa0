#!/usr/bin/env bash
# Pre-train ViT-S/16 on Imagenette at 160 pixels for 200 epochs.
# For one GPU; time is not measured. Published elsewhere for 200 epochs: probe 84.1 %, k-NN 72.1 %.
. "$(dirname "$0")/common.sh"

python main_pretrain.py "${common[@]}" --output_dir "$out/pretrain-seed$seed" --model mae_vit_small_patch16 \
    --norm_pix_loss --mask_ratio 0.75 --batch_size 256 --epochs 200 --warmup_epochs 20 --blr 3e-4 --save_freq 50 \
    --monitor_freq 50 "$@"
keep pretrain
