# What the rows share. From outside: SEED, DATA (the folder that scripts/prepare_data.py made), OUT, RESULTS.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${SEED:-0} data=${DATA:-data/imagenette} out=${OUT:-output/imagenette} results=${RESULTS:-results/imagenette}
common="--data_path $data --input_size 160 --seed $seed --resume auto"

keep() { # ROW: its log goes to the others
    mkdir -p "$results/$1"
    cp "$out/$1-seed$seed/log.txt" "$results/$1/seed$seed.jsonl"
}
