#!/usr/bin/env bash
# Pre-train on the samples of Fashion-MNIST and segment their garments, with and without the pre-trained encoder, for
# seeds 0, 1 and 2. Needs segmentation_models_pytorch (requirements-dev.txt).
. "$(dirname "$0")/../common.sh"

python recipes/segmentation/garments.py "$data"
for seed in 0 1 2; do
    python main_pretrain.py --data_path samples/fashion_mnist --input_size 28 --model mae_vit_demo_patch4 \
        --batch_size 64 --epochs 40 --warmup_epochs 4 --lr 2e-3 --crop_scale 0.8 1.0 --num_workers 0 --monitor_freq 0 \
        --seed $seed --resume auto --output_dir "$out/pretrain-seed$seed"
    python main_export.py --resume "$out/pretrain-seed$seed/checkpoint-39.pth" --to timm --output "$out/encoder-seed$seed"
    for row in finetune scratch; do
        python recipes/segmentation/train.py --encoder "$out/encoder-seed$seed" --data_path "$data" --classes 11 \
            --size 32 --epochs 20 --seed $seed --output_dir "$out/$row-seed$seed" "$@" \
            $([ $row = finetune ] || echo --scratch --encoder_lr 1)
        keep $row
    done
done
