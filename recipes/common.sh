# Sourced by every recipe: goes to the repository's root and sets the folders, which these variables can change:
#     SEED       seed of the run; default: 0
#     DATA       folder that scripts/prepare_data.py wrote; default: data/<dataset>
#     OUT        folder of the runs; default: output/<dataset>
#     RESULTS    folder of the logs that are stored; default: results/<dataset>
set -euo pipefail
set=$(basename "$(cd "$(dirname "$0")" && pwd)")
cd "$(dirname "$0")/../.."
seed=${SEED:-0} data=${DATA:-data/$set} out=${OUT:-output/$set} results=${RESULTS:-results/$set}

# Store the log of a complete run among the results: keep ROW
keep() {
    mkdir -p "$results/$1"
    cp "$out/$1-seed$seed/log.txt" "$results/$1/seed$seed.jsonl"
}
