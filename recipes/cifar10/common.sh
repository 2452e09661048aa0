# Sourced by the recipes for CIFAR-10: the flags that its jobs share.
. "$(dirname "$0")/../common.sh"
common=(--data_path "$data" --input_size 32 --patch_size 2 --seed $seed --resume auto)
