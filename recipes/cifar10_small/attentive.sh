#!/usr/bin/env bash
# Train an attentive probe on the encoder for 20 epochs: a learned query pools the patch tokens.
. "$(dirname "$0")/common.sh"

python main_linprobe.py "${classify[@]}" --output_dir "$out/attentive-seed$seed" --finetune "$encoder" \
    --probe attentive --lr 3e-2 "${frozen[@]}" "$@"
keep attentive
