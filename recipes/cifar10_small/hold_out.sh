#!/usr/bin/env bash
# Hold out every tenth training image of each class, to choose hyper-parameters without the test images:
#     recipes/cifar10_small/hold_out.sh
#     DATA=data/cifar10_held_out recipes/cifar10_small/finetune.sh
# Writes links: data/cifar10_held_out/train holds 45,000 of the training images, data/cifar10_held_out/val 5,000.
. "$(dirname "$0")/common.sh"

source=$(cd "$data" && pwd)
for class in "$source"/train/*; do
    train=() val=()
    for file in "$class"/*; do
        if (((${#train[@]} + ${#val[@]}) % 10 == 9)); then val+=("$file"); else train+=("$file"); fi
    done
    for split in train val; do
        held=${data}_held_out/$split/$(basename "$class")
        mkdir -p "$held"
        declare -n files=$split
        if ((${#files[@]})); then printf '%s\0' "${files[@]}" | xargs -0 ln -sft "$held"; fi
    done
done
