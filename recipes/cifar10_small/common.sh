# Sourced by the recipes for CIFAR-10 with the small encoder: the flags that its jobs and classifiers share.
. "$(dirname "$0")/../common.sh"
data=${DATA:-data/cifar10}
common=(--data_path "$data" --input_size 32 --num_workers 1 --amp off --seed $seed --resume auto)
