#!/usr/bin/env bash
# Pre-train ViT-S/16 on Imagenette at 224 pixels for 200 epochs, with a decoder of 4 blocks, 384 wide.
# For one GPU; time is not measured. Size, decoder, batch and rate are those of a published run; see RESULTS.md.
. "$(dirname "$0")/common.sh"

python main_pretrain.py "${common[@]}" --output_dir "$out/pretrain-seed$seed" --model mae_vit_small_patch16 \
    --decoder_dim 384 --decoder_depth 4 --decoder_heads 6 --norm_pix_loss --mask_ratio 0.75 --batch_size 128 \
    --epochs 200 --warmup_epochs 20 --lr 5e-4 --save_freq 50 --monitor_freq 50 "$@"
keep pretrain
