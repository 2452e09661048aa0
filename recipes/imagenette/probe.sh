#!/usr/bin/env bash
# Train a linear probe on the mean of the patch tokens of pretrain.sh's encoder, on Imagenette for 90 epochs.
# For one GPU; time and accuracy are not measured.
. "$(dirname "$0")/common.sh"

python main_linprobe.py "${common[@]}" --output_dir "$out/probe-seed$seed" --nb_classes 10 --model vit_small_patch16 \
    --global_pool --batch_size 256 --epochs 90 --blr 0.1 --finetune "$out/pretrain-seed$seed/checkpoint-199.pth" "$@"
keep probe
