"""The table of speeds and memory."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize("family, modulations, patch", [("mp", 2 * 1.5 + 2, 5), ("plain", 6, 4)])
def test_products_are_those_of_the_linear_layers_and_flops_those_and_attention(family, modulations, patch):
    D, depth, T, batch = 96, 4, 16, 3
    training = Training(family, {"image_size": 8, "channels": 1}, CPU)
    of_tokens = T * D * (patch + depth * 12 * D + 4)  # input, blocks, output: multiplications for an image
    of_cond = D * D * (depth * modulations + {"mp": 1 + 1.5, "plain": 2 + 2}[family])  # noise, blocks, output
    compute = training.products(batch, False)
    with FlopCounterMode(display=False) as counter:
        compute()
    assert counter.get_total_flops() == 3 * 2 * batch * (of_tokens + of_cond)  # forward, and two backward
    attention = 3 * 2 * 2 * depth * T**2 * D
    assert training.flops() == pytest.approx(3 * 2 * (of_tokens + of_cond) + attention, rel=1e-3)


def test_memory_held_is_five_numbers_for_each_weight():
    training = Training("mp", {"image_size": 8, "channels": 1}, CPU)
    training.step(2, False, False)
    numbers = sum(p.numel() for p in training.denoiser.parameters())
    assert 20 * numbers < training.held() < 20.5 * numbers and not any(p.grad for p in training.denoiser.parameters())
