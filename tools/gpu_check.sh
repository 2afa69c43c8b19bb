#!/usr/bin/env bash
# What only a GPU can show, in ten minutes of one: the tests that need CUDA, the table of speeds, a profile of one step
# of XL/2, and the Fashion-MNIST recipe to its picture.
#   bash tools/gpu_check.sh [FOLDER]          # each part's output lands in FOLDER (out/gpu-check)
#   TINY=1 bash tools/gpu_check.sh [FOLDER]   # a rehearsal on a CPU: the same parts, tiny, in a few minutes
# It needs no network and installs nothing: PYTHON (python3) must have torch, numpy, pillow, scipy and pytest, and
# datasets/fashion-mnist must be prepared. A part that takes too long is ended. The exit code says how many failed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-out/gpu-check}
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
mkdir -p "$folder"
failed=0

if [ -n "${TINY:-}" ]; then
    middle=(digits inception) large=(28x28)
    ways=(--device=cpu --precision float32 --compile false --batch=2 --seconds=0)
    step=(--families mp)
    recipe=(--device=cpu --steps=20 --batch=8 --model.depth=1 --model.width=32)
else
    middle=(DiT-B/2 inception) large=(DiT-XL/2)
    ways=(--device=cuda --precision bfloat16 --seconds=5)
    step=(--families mp --compile true --seconds=0)
    recipe=(--device=cuda)
fi

part() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$folder/$name.txt"
    local code=$?
    [ $code = 0 ] || failed=$((failed + 1))
    echo "== $name: exit code $code after $((SECONDS - begin)) s"
}

part tests 90 $python -m pytest -q tests/test_cuda.py
part speed 110 $python -m tools.speed "${ways[@]}" --rows "${middle[@]}"
part speed-large 180 $python -m tools.speed "${ways[@]}" --rows "${large[@]}"
part profile 70 $python -m tools.speed "${ways[@]}" "${step[@]}" --rows "${large[@]}" --profile
part recipe 110 $python train.py --config=configs/fashion-mnist.toml "${recipe[@]}" --out="$run"
part picture 40 $python sample.py "$run" --out="$folder/fashion-mnist.png"
cp "$run/log.jsonl" "$folder/fashion-mnist.jsonl"
echo "$failed parts failed; see $folder"
exit $failed
