# What all sets' rows share. From outside: SEED, DATA (the folder that scripts/prepare_data.py made), OUT, RESULTS.
set -euo pipefail
set=$(basename "$(cd "$(dirname "$0")" && pwd)")
cd "$(dirname "$0")/../.."
seed=${SEED:-0} data=${DATA:-data/$set} out=${OUT:-output/$set} results=${RESULTS:-results/$set}

keep() { # ROW: its log goes to the others
    mkdir -p "$results/$1"
    cp "$out/$1-seed$seed/log.txt" "$results/$1/seed$seed.jsonl"
}
