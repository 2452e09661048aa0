# Sourced by every recipe: goes to the repository's root and sets the folders, which these variables can change:
#     SEED       seed of the run; default: 0 (imbalanced and segmentation run seeds 0, 1 and 2)
#     DATA       folder of the images; default: data/<dataset>
#     OUT        folder of the runs; default: output/<recipes' folder>
#     RESULTS    folder of the logs that are stored; default: results/<recipes' folder>
set -euo pipefail
set=$(basename "$(cd "$(dirname "$0")" && pwd)")
cd "$(dirname "$0")/../.."
seed=${SEED:-0} data=${DATA:-data/${set%_small}} out=${OUT:-output/$set} results=${RESULTS:-results/$set}

# Store the log of a complete run among the results: keep ROW
keep() {
    mkdir -p "$results/$1"
    cp "$out/$1-seed$seed/log.txt" "$results/$1/seed$seed.jsonl"
}

# Classify val/ by the 20 nearest images of train/, in the mean of an encoder's patch tokens: neighbours CHECKPOINT FLAGS
neighbours() {
    mkdir -p "$out/knn-seed$seed"
    python main_features.py --resume "$1" --data_path "$data/val" --neighbours "$data/train" --crop_pct 1 \
        --batch_size 250 --output "$out/knn-seed$seed/features.npz" "${@:2}" | tee "$out/knn-seed$seed/out.txt"
    # The printed accuracy becomes a log in the form of the other rows'.
    sed -n 's/^k-NN.*: \([0-9.]*\) %$/{"test_acc1": \1}/p' "$out/knn-seed$seed/out.txt" > "$out/knn-seed$seed/log.txt"
    keep knn
}

# Classify raw pixels, by logistic regression and by nearest neighbours: pixels FLAGS
pixels() {
    mkdir -p "$out/pixels-seed$seed"
    python scripts/pixel_baseline.py --data_path "$data" "$@" | tee "$out/pixels-seed$seed/log.txt"
    keep pixels
}
