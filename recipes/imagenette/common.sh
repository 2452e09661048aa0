# Sourced by the recipes for Imagenette: the flags that its jobs share.
. "$(dirname "$0")/../common.sh"
common=(--data_path "$data" --input_size 224 --seed $seed --resume auto)
