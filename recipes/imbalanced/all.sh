#!/usr/bin/env bash
# Fine-tune on classes of 200 to 5 images, with and without weights of the classes in the loss, for seeds 0, 1 and 2.
# Takes about ten minutes on one CPU core; the images are links to samples/.
. "$(dirname "$0")/../common.sh"

# Of the ten classes 200, 133, 88, 58, 39, 26, 17, 11, 8 and 5 training images; 200 of each for validation.
sizes=(200 133 88 58 39 26 17 11 8 5)
number=0
for class in samples/fashion_mnist/train/*; do
    name=$(basename "$class")
    mkdir -p "$data/train/$name" "$data/val/$name"
    files=("$PWD/$class"/*)
    ln -sf "${files[@]:0:${sizes[$number]}}" "$data/train/$name"
    ln -sf "$PWD/samples/fashion_mnist/val/$name"/* "$data/val/$name"
    number=$((number + 1))
done

python main_pretrain.py --data_path samples/fashion_mnist --input_size 28 --model mae_vit_demo_patch4 --batch_size 128 \
    --epochs 30 --warmup_epochs 3 --lr 2e-3 --crop_scale 0.6 1.0 --num_workers 0 --monitor_freq 0 --resume auto \
    --output_dir "$out/pretrain" "$@"
for seed in 0 1 2; do
    for weights in none balanced; do
        python main_finetune.py --data_path "$data" --input_size 28 --nb_classes 10 --model vit_demo_patch4 \
            --finetune "$out/pretrain/checkpoint-29.pth" --batch_size 64 --epochs 15 --warmup_epochs 2 --lr 2e-3 \
            --aa none --reprob 0 --crop_scale 0.8 1.0 --crop_pct 1 --drop_path 0 --num_workers 0 --seed $seed \
            --eval_freq 15 --class_weights $weights --resume auto --output_dir "$out/$weights-seed$seed" "$@"
        keep $weights
    done
done
