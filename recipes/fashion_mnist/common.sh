# What the rows share. From outside: SEED, DATA (the folder that scripts/prepare_data.py made), OUT, RESULTS.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${SEED:-0} data=${DATA:-data/fashion_mnist} out=${OUT:-output/fashion_mnist} results=${RESULTS:-results/fashion_mnist}
common="--data_path $data --input_size 28 --num_workers 1 --amp off --seed $seed --resume auto"
classify="$common --nb_classes 10 --crop_pct 1 --save_freq 100 --keep 1 --model vit_demo_patch4"
encoder="$out/pretrain-seed$seed/checkpoint-14.pth"

keep() { # ROW: its log goes to the others
    mkdir -p "$results/$1"
    cp "$out/$1-seed$seed/log.txt" "$results/$1/seed$seed.jsonl"
}
