#!/usr/bin/env bash
# Train a linear probe on the encoder's class token for 20 epochs.
. "$(dirname "$0")/common.sh"

python main_linprobe.py "${classify[@]}" --output_dir "$out/probe_cls-seed$seed" --finetune "$encoder" --cls_token \
    --blr 30 "${frozen[@]}" "$@"
keep probe_cls
