# Sourced by the recipes for Fashion-MNIST: the flags that its jobs and classifiers share, and the encoder they use.
. "$(dirname "$0")/../common.sh"
common=(--data_path "$data" --input_size 28 --num_workers 1 --amp off --seed $seed --resume auto)
classify=("${common[@]}" --nb_classes 10 --crop_pct 1 --save_freq 100 --keep 1 --model vit_demo_patch4)
encoder="$out/pretrain-seed$seed/checkpoint-14.pth"
