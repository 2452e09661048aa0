#!/usr/bin/env bash
# Train a logistic regression on raw pixels, for comparison, and classify by the nearest training images in raw pixels.
# Needs scikit-learn (requirements-dev.txt).
. "$(dirname "$0")/common.sh"

pixels "$@"
