#!/usr/bin/env bash
# Classify by the 20 nearest of the 60,000 training images, weighted, in the mean of pretrain.sh's patch tokens.
# Takes 2 minutes on one CPU core. Expected accuracy: 86.3 to 86.6 %.
. "$(dirname "$0")/common.sh"

neighbours "$encoder" "$@"
