#!/bin/bash
# results/muon.md: five runs of each family with each optimizer, two to four minutes of a core each, and the distance of
# 10,000 samples of each. From the repository's root: bash configs/sweeps/muon.sh [more options of train.py]
set -e
features=--features=tools.classifier:pretrained/features16.pt
measure() {  # NAME OPTIONS...
    local run=out/muon/$1
    python train.py --config=configs/compare.toml --schedule=linear --compile=true --out="$run" "${@:2}"
    python sample.py "$run" --count=10000 --steps=18 --ema=0.10 --out="$run/samples.npz"
    local distance
    distance=$(python fid.py compare "$run/samples.npz" fashion-mnist-16 $features)
    echo "$1: $distance"
}
[ -e datasets/fashion-mnist-16 ] || python data.py fashion-mnist --size=16 --name=fashion-mnist-16
for seed in 0 1 2 3 4; do
    measure plain-adam-$seed --seed=$seed --model.block=plain --learning_rate=0.016 "$@"
    measure mp-adam-$seed --seed=$seed "$@"
    measure plain-muon-$seed --seed=$seed --model.block=plain --learning_rate=0.008 --optimizer=muon --matrix_rate=5 \
        "$@"
    measure mp-muon-$seed --seed=$seed --optimizer=muon "$@"
done
