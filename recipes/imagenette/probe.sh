#!/usr/bin/env bash
# Linear probe of pretrain.sh's encoder on Imagenette, 90 epochs.
# One GPU; time and accuracy: not measured.
. "$(dirname "$0")/common.sh"

python main_linprobe.py "${common[@]}" --output_dir "$out/probe-seed$seed" --nb_classes 10 --model vit_small_patch16 \
    --cls_token --batch_size 256 --epochs 90 --blr 0.1 --finetune "$out/pretrain-seed$seed/checkpoint-199.pth" "$@"
keep probe
