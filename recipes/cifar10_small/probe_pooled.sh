#!/usr/bin/env bash
# Train a linear probe on the mean of the encoder's patch tokens for 20 epochs.
. "$(dirname "$0")/common.sh"

python main_linprobe.py "${classify[@]}" --output_dir "$out/probe_pooled-seed$seed" --finetune "$encoder" \
    --global_pool --blr 8 "${frozen[@]}" "$@"
keep probe_pooled
