#!/usr/bin/env bash
# Hold out every tenth training image of each class, to choose hyper-parameters without the test images:
#     recipes/cifar10_small/hold_out.sh
#     DATA=data/cifar10_held_out recipes/cifar10_small/finetune.sh
# Writes links: data/cifar10_held_out/train holds 45,000 of the training images, data/cifar10_held_out/val 5,000.
. "$(dirname "$0")/common.sh"

source=$(cd "$data" && pwd)
for class in $(ls "$source/train"); do
    mkdir -p "${data}_held_out/train/$class" "${data}_held_out/val/$class"
    find "$source/train/$class" -type f | sort | awk 'NR % 10 == 0' | xargs ln -sft "${data}_held_out/val/$class"
    find "$source/train/$class" -type f | sort | awk 'NR % 10 != 0' | xargs ln -sft "${data}_held_out/train/$class"
done
