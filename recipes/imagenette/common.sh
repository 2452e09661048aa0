. "$(dirname "$0")/../common.sh"
common=(--data_path "$data" --input_size 160 --seed $seed --resume auto)
