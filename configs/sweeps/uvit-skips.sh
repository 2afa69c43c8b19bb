#!/bin/bash
# results/long-skips.md, on U-ViT: six seeds for each factor, and the picture.
set -e
for scaling in none sqrt constant learned; do
    for seed in 0 1 2 3 4 5; do
        python train.py --config=configs/uvit.toml --model.depth=13 --steps=500 --warmup_steps=20 --decay_steps=0 \
            --val_every=50 --log_every=5 --snapshot_every=0 --learning_rate=0.004 --model.skip_scaling=$scaling \
            --seed=$seed --out=out/uvit-skips/$scaling-$seed "$@"
    done
done
python -m tools.plots out/uvit-skips/* --key=token_rms_last --by=model.skip_scaling --out=out/skips-rms.svg
