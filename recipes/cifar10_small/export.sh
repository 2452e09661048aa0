#!/usr/bin/env bash
# Write the pre-trained weights of pretrain.sh as weights/mae_vit_demo_patch4_cifar10, in Hugging Face's form (ViTMAE).
. "$(dirname "$0")/common.sh"

python main_export.py --resume "$out/pretrain-seed$seed/checkpoint-199.pth" --to hf --license apache-2.0 \
    --output weights/mae_vit_demo_patch4_cifar10
