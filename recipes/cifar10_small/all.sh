#!/usr/bin/env bash
# Run every row that starts from the stored weights, with the seeds of the table; training that is complete is not
# repeated. JOBS=N runs N trainings at a time (on a CPU with OMP_NUM_THREADS=1). Flags go to all of them.
# First prepare:
#     python scripts/prepare_data.py cifar10 --output data/cifar10
. "$(dirname "$0")/common.sh"

# Print the command of a row: row SEED NAME FLAGS
row() {
    printf '%q ' "recipes/cifar10_small/$2.sh" "${@:3}" | sed "s/^/SEED=$1 /"
    printf '\0'
}

recipes/cifar10_small/knn.sh
recipes/cifar10_small/pixels.sh
{
    row 0 finetune "$@"
    row 0 scratch "$@"
    for number in 0 1 2; do
        for name in finetune_10pct scratch_10pct probe_cls probe_pooled attentive; do
            row $number $name "$@"
        done
    done
} | xargs -0 -P "${JOBS:-1}" -I COMMAND bash -c COMMAND
