#!/usr/bin/env bash
# Train a logistic regression on raw pixels, for comparison; needs scikit-learn (requirements-dev.txt).
# Takes 75 seconds on one CPU core. Expected accuracy: 83.6 %.
. "$(dirname "$0")/common.sh"

mkdir -p "$out/pixels-seed$seed"
python scripts/pixel_baseline.py --data_path "$data" "$@" | tee "$out/pixels-seed$seed/log.txt"
keep pixels
