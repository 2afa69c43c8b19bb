"""The table of speeds and memory."""

import re

import torch

from fid import fold_normalization
from helpers import CPU, call, second_inception
from tools.speed import Training, inception_shapes


def test_speed_has_a_row_for_each_way_and_says_what_to_use():
    result = call("tools.speed", "--rows", "digits", "--compile", "false", "--batch=2", "--seconds=0",
                  "--precision", "float32")
    row = r"\| digits, batch 2 \| {} \| false \| float32 \| [\d.]+ \([\d.]+\) \| [\d.]+ \| \d+% \| 0.0[12] GiB \|\n"
    assert re.search(row.format("mp") + row.format("plain"), result.stdout), result
    assert result.stdout.endswith("\noptions to use here: digits --compile=false --precision=float32\n")


def test_inception_is_timed_with_kernels_of_the_right_shapes():
    _, state = second_inception(torch.zeros(1, 3, 80, 80))
    shapes = {name: tuple(kernel.shape) for name, (kernel, _) in fold_normalization(state).items()}
    assert shapes == inception_shapes()


def test_memory_held_is_five_numbers_for_each_weight():
    training = Training("mp", {"image_size": 8, "channels": 1}, CPU)
    training.step(2, False, False)
    numbers = sum(p.numel() for p in training.denoiser.parameters())
    assert 20 * numbers < training.held() < 20.5 * numbers and not any(p.grad for p in training.denoiser.parameters())
