#!/usr/bin/env bash
# Train a logistic regression on raw pixels, for comparison, and classify by the nearest training images in raw pixels.
# Needs scikit-learn (requirements-dev.txt). Takes 75 seconds on one CPU core. Expected accuracy: 83.6 %.
. "$(dirname "$0")/common.sh"

pixels "$@"
