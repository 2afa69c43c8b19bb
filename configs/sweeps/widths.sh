#!/bin/bash
# results/widths.md: val_loss against the rate at three widths, for both families with both optimizers, 500 steps each,
# three hours of a core in all, and their picture. From the repository's root:
#   bash configs/sweeps/widths.sh [more options of train.py]
set -e
[ -e datasets/fashion-mnist-16 ] || python data.py fashion-mnist --size=16 --name=fashion-mnist-16
run() {  # FAMILY OPTIMIZER WIDTH RATE [more options]
    local out=out/widths/$1-$2-$3-$4
    python train.py --config=configs/compare.toml --schedule=linear --compile=true --steps=500 --warmup_steps=3 \
        --out="$out" --model.block="$1" --optimizer="$2" --model.width="$3" --model.heads=$(($3 / 32)) \
        --learning_rate="$4" "${@:5}"
}
for width in 64 128; do
    for rate in 0.001 0.002 0.004 0.008 0.016 0.032; do
        run plain adam $width $rate "$@"
        run plain muon $width $rate --matrix_rate=5 "$@"
    done
    for rate in 0.01 0.02 0.04 0.08 0.16 0.32; do
        run mp adam $width $rate "$@"
        run mp muon $width $rate "$@"
    done
done
for rate in 0.001 0.002 0.004 0.008; do run plain adam 256 $rate "$@"; done
for rate in 0.02 0.04 0.08 0.16; do run mp adam 256 $rate "$@"; done
for rate in 0.004 0.008 0.016; do run plain muon 256 $rate --matrix_rate=5 "$@"; done
for rate in 0.04 0.08 0.16; do run mp muon 256 $rate "$@"; done
python -m tools.plots out/widths/* --key=val_loss --against=learning_rate --by=model.width \
    --panels=optimizer,model.block --top=0.28 --out=out/widths.svg
