#!/bin/bash
# results/long-skips.md: one run for each factor, and how much magnitudes varied. Arguments: family, learning rate.
set -e
block=$1
rate=$2
for scaling in none sqrt constant learned; do
    python train.py --config=configs/scalelong.toml --model.block=$block --learning_rate=$rate --model.depth=13 \
        --steps=300 --decay_steps=0 --model.skip_scaling=$scaling --seed=1 --out=out/skip-$block-$scaling
done
python -m variants.scalelong out/skip-$block-*
