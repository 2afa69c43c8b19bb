"""Configuration, and what one step is made of."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from data import Dataset, batch_indices, from_network, load_dataset, to_network
from helpers import ROOT, TINY, call, done, log, run
from model import DiTConfig, edm2_loss
from plumbing.config import flatten, load_config
from train import (TrainConfig, build, draw_step, learning_rate, make_generator, optimizer_step, prepare_batch,
                   validation_errors)

CPU, DIGITS = torch.device("cpu"), load_dataset("digits")
TOY = DiTConfig(depth=1, width=16, heads=1)


def batch_of(config, dataset, step=0):
    """A step's batch: images, labels, sigma, noise."""
    indices = batch_indices(len(dataset), config.seed, step * config.batch, config.batch)
    images, labels = next(dataset.feed([indices], CPU))
    return prepare_batch(config, dataset.facts, images, labels, draw_step(config, dataset, step, CPU), slice(None))


def test_learning_rate_warms_up_stays_and_falls_as_one_over_sqrt():
    config = TrainConfig(learning_rate=0.02, warmup_steps=9, decay_steps=100)
    for step, rate in ((0, 0.002), (4, 0.01), (9, 0.02), (100, 0.02), (400, 0.01), (10000, 0.002)):
        assert learning_rate(step, config) == pytest.approx(rate)
    assert learning_rate(10**6, TrainConfig(learning_rate=0.02, decay_steps=0)) == 0.02
    config = TrainConfig(learning_rate=0.02, warmup_steps=9, schedule="linear", steps=100)
    for step, rate in ((0, 0.002), (4, 0.01 * 0.96), (9, 0.02 * 0.91), (50, 0.01), (99, 0.0002)):
        assert learning_rate(step, config) == pytest.approx(rate)


def test_random_numbers_never_repeat_within_or_between_runs():
    def first(number, seed=0):
        return str(torch.rand(2, generator=make_generator(TrainConfig(seed=seed), number, CPU)).tolist())

    numbers = [*range(200), *range(2**31 - 100, 2**31 + 100), *range(2**32 - 200, 2**32)]
    assert len({first(number) for number in numbers}) == 600 and first(7) == first(7)
    assert first(7, seed=5) != first(7, seed=5 + 2**32)  # torch uses 32 bits of a seed


def test_draws_have_the_distributions_of_the_recipe():
    config = TrainConfig(batch=20000, p_mean=-0.4, p_std=1.3, model=TOY.for_data(8, 1, 10))
    images, labels, sigma, noise = batch_of(config, DIGITS)
    dropped = (labels == 10).float()
    for values, mean, std in ((sigma.log(), -0.4, 1.3), (noise, 0, 1), (images, 0, 0.5), (dropped, 0.1, 0.3)):
        assert values.mean().item() == pytest.approx(mean, abs=0.03)
        assert values.std().item() == pytest.approx(std, abs=0.03)
    config.model = dataclasses.replace(config.model, num_classes=0)  # unconditional: the null label alone
    assert labels.max() == 10 and (batch_of(config, DIGITS)[1] == 0).all()
    mirrored = (batch_of(dataclasses.replace(config, flip=True), DIGITS)[0] == images.flip(-1)).all((1, 2, 3))
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_latents_are_drawn_afresh_from_their_posterior():
    mean, std = np.random.default_rng(0).random((2, 4, 2, 2), np.float32)
    facts = {"latent": True, "mean": [1.0] * 4, "std": [2.0] * 4, "classes": [], "counts": [], "hashes": {}}
    dataset = Dataset(np.repeat(np.concatenate([mean, std])[None], 50, axis=0), np.zeros(50, np.int64), facts)
    config = TrainConfig(batch=5000, model=TOY.for_data(2, 4, 0))
    images = from_network(batch_of(config, dataset)[0], facts).numpy()
    np.testing.assert_allclose(images.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(images.std(0), std, rtol=0.1)


def test_a_step_takes_gradients_that_are_not_finite_as_zero():
    model = dataclasses.replace(TOY.for_data(8, 1, 10), gain_rate=0.1)
    denoiser, _, optimizer = build(TrainConfig(model=model), CPU)
    frozen, matrix = denoiser.net.input.label.weight, denoiser.net.blocks[0].attention.out.weight
    before, ratio = frozen.clone(), matrix[0, 0].item() / matrix[0, 1].item()
    for p in denoiser.parameters():
        p.grad = None if p is frozen else torch.ones_like(p)
    matrix.grad[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    optimizer_step(denoiser, optimizer, 0.05)
    assert denoiser.net.output.gain.item() == pytest.approx(-0.05)  # Adam's first step, whatever the gradient
    torch.testing.assert_close(denoiser.net.blocks[0].modulation1.gain, torch.full((2,), -0.005))
    assert (matrix[0, 0] / matrix[0, 1]).item() == pytest.approx(ratio)  # neither moved, but for the row's length
    torch.testing.assert_close(frozen, before)
    torch.testing.assert_close(matrix.square().mean(1), torch.ones(16))


def test_the_gradient_is_that_of_the_sum_over_pixels(tmp_path):
    done("train.py", *TINY, "--steps=1", "--micro_batch=4", f"--out={tmp_path}")
    config = load_config(TrainConfig, TINY)
    config.model = config.model.for_data(8, 1, 10)
    denoiser, _, _ = build(config, CPU)
    batch = batch_of(config, DIGITS)
    loss = edm2_loss(denoiser, denoiser.uncertainty(batch[2]), *batch)
    (8 * 8 * loss).backward()
    norm = math.sqrt(sum(p.grad.square().sum() for p in denoiser.parameters() if p.ndim == 2))
    assert log(tmp_path)[0]["gradient_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0
    assert log(tmp_path)[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_val_loss_is_the_weighted_error_on_held_out_images():
    """A network whose last gain is 0 predicts c_skip·x, so that its error is known in closed form."""
    config = TrainConfig(model=TOY.for_data(8, 1, 10))
    denoiser, *_ = build(config, CPU, bfloat16=True)
    variance = to_network(torch.from_numpy(np.array(DIGITS.holdout.images)), DIGITS.facts).square().mean().item()
    s2 = torch.distributions.Normal(-0.4, 1).icdf((torch.arange(10**4) + 0.5) / 10**4).mul(2).exp()
    skip = 0.25 / (s2 + 0.25)
    expected = ((s2 + 0.25) / (0.25 * s2) * ((1 - skip) ** 2 * variance + skip**2 * s2)).view(10, -1).mean(1)
    errors = validation_errors(denoiser, config, DIGITS.holdout)
    assert errors == pytest.approx(expected.tolist(), rel=0.1) and denoiser.in_bfloat16
    value = np.mean(errors)
    assert value == pytest.approx(expected.mean().item(), rel=0.02)
    other = TrainConfig(seed=9, p_mean=2.0, flip=True, batch=7, model=dataclasses.replace(config.model, block="plain"))
    assert validation_errors(build(other, CPU)[0], other, DIGITS.holdout) == pytest.approx(errors, rel=1e-5)
    for name, parameter in denoiser.named_parameters():  # now the network and the labels matter
        parameter.data += 0.3 * name.endswith("gain")
    changed = validation_errors(denoiser, config, DIGITS.holdout)
    denoiser.in_bfloat16 = False
    assert validation_errors(denoiser, config, DIGITS.holdout) == changed and np.mean(changed) > 1.01 * value
    others = dataclasses.replace(DIGITS.holdout, labels=9 - DIGITS.holdout.labels)
    assert validation_errors(denoiser, config, others) != changed


def test_keys_come_from_defaults_then_file_then_command_line(tmp_path):
    text = 'compile = true\nsteps = 7\nlearning_rate = 1\nema_stds = [0.2]\n[model]\nsize = "XS"\nheads = 8\n'
    (tmp_path / "a.toml").write_text(text, encoding="utf-8-sig")  # as Windows' editor saves it
    words = ["--steps=9", "--model.modulation=gate, shift", "--ema_stds=0.1,0.2", "--compile=false", "--p_mean=-.5"]
    config = load_config(TrainConfig, [f"--config={tmp_path / 'a.toml'}", *words])
    assert (config.steps, config.learning_rate, config.batch, config.compile) == (9, 1.0, TrainConfig().batch, "false")
    assert config.model.modulation == ("shift", "gate") and config.ema_stds == (0.1, 0.2) and config.p_mean == -0.5
    assert (config.model.depth, config.model.width, config.model.heads) == (6, 256, 8)
    printed = call("train.py", "--help").stdout
    assert all(f"--{name} " in printed for name in flatten(config))


@pytest.mark.parametrize("text, message", [
    ("[model]\nwidht = 3", "FILE: model.widht: unknown key; did you mean 'model.width'?"),
    ("depth = 3", "FILE: depth: unknown key; did you mean 'model.depth'?"),
    ('steps = "100"', "FILE: steps: must be a whole number"),
    ("--config=nowhere.toml", "nowhere.toml: there is no such file"),
    ("--learning=10", "--learning: unknown key; did you mean '--learning_rate'?"),  # not an abbreviation
    ("--seed=1 digits.toml", "digits.toml: unknown key; did you mean '--config=digits.toml'?"),
    ("--xyzzy=1", "--xyzzy: unknown key; see --help; keys of a variant need --variant=NAME"),
    ("--model.channels=3", "channels: 3, but the dataset has 1"),
    ("--batch=64 --micro_batch=7", "batch: 64 must split evenly"),
    ("--dataset=digit", "dataset: there is no 'digit'"),
    (f"--dataset={ROOT}", f"do it once with: python data.py {ROOT}"),
    ("compile = 1", "FILE: compile: must be one of auto, true, false, not 1"),
    ("--device=abacus", "device: 'abacus' cannot be used"),
    ("--model.depth=x", "command line: model.depth: must be a whole number"),
    ("--variant=plots", "--variant: there is no variants/plots.py"),
    ("variant = 'plots'", "FILE: there is no variants/plots.py"),
])
def test_a_mistake_in_the_configuration_is_one_line(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    words = text.split() if text.startswith("--") else [f"--config={tmp_path / 'a.toml'}"]
    result = call("train.py", f"--out={tmp_path / 'run'}", *words)
    assert result.returncode == 2 and re.fullmatch(r"train\.py: .{,500}\n", result.stderr)
    assert message.replace("FILE", str(tmp_path / "a.toml")) in result.stderr
