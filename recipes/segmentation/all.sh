#!/usr/bin/env bash
# Pre-train on the 2,000 training samples of Fashion-MNIST, and segment their garments with and without the pre-trained
# encoder: from all masks, and from 20 of each class. Seeds 0, 1 and 2. Needs segmentation_models_pytorch.
. "$(dirname "$0")/../common.sh"

# Train on a folder of masks for some epochs: train ROW FOLDER EPOCHS FLAGS
train() {
    python recipes/segmentation/train.py --encoder "$out/encoder-seed$seed" --data_path "$2" --classes 11 --size 32 \
        --epochs "$3" --seed $seed --output_dir "$out/$1-seed$seed" --overwrite "${@:4}"
    keep "$1"
}

python recipes/segmentation/garments.py "$data"
python recipes/segmentation/garments.py "$data-few" --images 20
for seed in 0 1 2; do
    python main_pretrain.py --data_path samples/fashion_mnist --input_size 28 --model mae_vit_demo_patch4 \
        --batch_size 64 --epochs 40 --warmup_epochs 4 --lr 2e-3 --crop_scale 0.8 1.0 --num_workers 0 --monitor_freq 0 \
        --seed $seed --resume auto --output_dir "$out/pretrain-seed$seed"
    python main_export.py --resume "$out/pretrain-seed$seed/checkpoint-39.pth" --to timm --output "$out/encoder-seed$seed"
    train finetune "$data" 20 "$@"
    train scratch "$data" 20 --scratch --encoder_lr 1 "$@"
    train finetune_few "$data-few" 40 --eval_freq 10 "$@"
    train scratch_few "$data-few" 40 --eval_freq 10 --scratch --encoder_lr 1 "$@"
done
