#!/bin/bash
# results/rates.md: nine runs of each family, half an hour to an hour and a half of a core in all, and their picture.
# From the repository's root: bash configs/sweeps/rates.sh [more options of train.py]
set -e
run() { python train.py --config=configs/compare.toml "$@"; }
[ -e datasets/fashion-mnist-16 ] || python data.py fashion-mnist --size=16 --name=fashion-mnist-16
for seed in 0 1 2; do
    for rate in 0.04 0.08 0.16; do
        run --out=out/rates/mp-$rate-$seed --seed=$seed --learning_rate=$rate "$@"
    done
    for rate in 0.004 0.008 0.016; do
        run --out=out/rates/plain-$rate-$seed --seed=$seed --learning_rate=$rate --model.block=plain "$@"
    done
done
python -m tools.plots out/rates/* --key=val_loss --against=learning_rate --by=model.block --out=out/rates.svg
