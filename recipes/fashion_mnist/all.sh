#!/usr/bin/env bash
# Run every row of Fashion-MNIST's table for one seed; training that is complete is not repeated. First prepare:
#     python scripts/prepare_data.py fashion_mnist --output data/fashion_mnist
# Takes about an hour on two cores with two rows at a time (OMP_NUM_THREADS=1), longer one after the other, as here.
. "$(dirname "$0")/common.sh"

for row in pretrain finetune scratch probe attentive knn pixels; do
    "recipes/fashion_mnist/$row.sh"
done
