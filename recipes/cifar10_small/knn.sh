#!/usr/bin/env bash
# Classify by the 20 nearest of the 50,000 training images, weighted, in the mean of the encoder's patch tokens.
. "$(dirname "$0")/common.sh"

neighbours "$encoder" "$@"
