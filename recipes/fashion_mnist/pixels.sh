#!/usr/bin/env bash
# Logistic regression on raw pixels, for comparison; needs scikit-learn (requirements-dev.txt).
# A few minutes on one CPU core.
. "$(dirname "$0")/common.sh"

mkdir -p "$out/pixels-seed$seed"
python scripts/pixel_baseline.py --data_path "$data" "$@" | tee "$out/pixels-seed$seed/log.txt"
keep pixels
