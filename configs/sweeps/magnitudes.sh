#!/bin/bash
# results/magnitudes.md: token RMS while both families train, and its picture; a few minutes of a core.
set -e
run() { python train.py --config=configs/compare.toml --log_every=5 "$@"; }
run --out=out/rms/mp "$@"
run --out=out/rms/plain --model.block=plain --learning_rate=0.008 "$@"
python -m tools.plots out/rms/mp out/rms/plain --key=token_rms_first,token_rms_middle,token_rms_last \
    --out=out/magnitudes.svg
