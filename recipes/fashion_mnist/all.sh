#!/usr/bin/env bash
# Every row of Fashion-MNIST's table for one seed; what is done already is passed over. First:
#     python scripts/prepare_data.py fashion_mnist --output data/fashion_mnist
# About an hour on two cores with two rows at a time (OMP_NUM_THREADS=1), longer one after the other.
. "$(dirname "$0")/common.sh"

for row in pretrain finetune scratch probe attentive knn pixels; do
    "recipes/fashion_mnist/$row.sh"
done
