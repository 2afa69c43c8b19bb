import dataclasses
import json
import math

import pytest
import torch

from data import Dataset, batch_indices, from_network, load_dataset
from model import DiTConfig
from train import TrainConfig, config_keys, draw_batch, learning_rate, load_config, save_config, zero_nonfinite

CPU = torch.device("cpu")


def digits_config(**changes):
    digits = load_dataset("digits")
    return TrainConfig(**changes, model=DiTConfig(depth=1, width=16, heads=1).fit(8, 1, 10)), digits


def test_learning_rate_warms_up_stays_and_falls_as_one_over_sqrt():
    config = TrainConfig(learning_rate=0.02, warmup_steps=9, decay_steps=100)
    assert learning_rate(0, config) == pytest.approx(0.002) and learning_rate(4, config) == pytest.approx(0.01)
    assert learning_rate(9, config) == learning_rate(100, config) == 0.02
    assert learning_rate(400, config) == pytest.approx(0.01) and learning_rate(10000, config) == pytest.approx(0.002)
    assert learning_rate(10**6, TrainConfig(learning_rate=0.02)) == 0.02


def draw(config, dataset, step, part, device):
    """Those rows of a step's batch, as the training loop gets them."""
    indices = batch_indices(len(dataset), config.seed, step * config.batch, config.batch)[part]
    (images, labels), = dataset.feed([indices], device)
    return draw_batch(config, dataset, images, labels, step, part, device)


def test_draws_are_a_function_of_seed_and_step_however_the_batch_is_split():
    config, digits = digits_config(batch=32)
    whole = draw(config, digits, 5, slice(0, 32), CPU)
    pieces = [draw(config, digits, 5, slice(start, start + 8), CPU) for start in range(0, 32, 8)]
    for i, value in enumerate(whole):
        assert torch.equal(torch.cat([piece[i] for piece in pieces]), value)
    for other in (draw(config, digits, 6, slice(0, 32), CPU),
                  draw(dataclasses.replace(config, seed=1), digits, 5, slice(0, 32), CPU)):
        assert not any(torch.equal(a, b) for a, b in zip(whole, other))


def test_draws_have_the_distributions_of_the_recipe():
    config, digits = digits_config(batch=20000, p_mean=-0.4, p_std=1.3)
    images, labels, sigma, noise = draw(config, digits, 0, slice(0, 20000), CPU)
    assert sigma.log().mean().item() == pytest.approx(-0.4, abs=0.03)
    assert sigma.log().std().item() == pytest.approx(1.3, abs=0.03)
    assert (labels == 10).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert labels.max() == 10 and images.std().item() == pytest.approx(0.5, abs=0.01)


def test_half_of_the_images_are_mirrored_if_asked_for():
    plain, digits = digits_config(batch=400)
    images, flipped = draw(plain, digits, 0, slice(0, 400), CPU)[0], draw(dataclasses.replace(plain, flip=True), digits, 0, slice(0, 400), CPU)[0]
    mirrored = (flipped == images.flip(-1)).all((1, 2, 3))
    assert ((flipped == images).all((1, 2, 3)) | mirrored).all() and 0.4 < mirrored.float().mean() < 0.6


def test_latents_are_drawn_afresh_from_their_posterior():
    mean, std = torch.randn(4, 2, 2), torch.rand(4, 2, 2) + 0.5
    dataset = Dataset(torch.cat([mean, std])[None].repeat(50, 1, 1, 1), torch.zeros(50, dtype=torch.long), 0)
    config = TrainConfig(batch=5000, model=DiTConfig(depth=1, width=16, heads=1, patch=1).fit(2, 4, 0))
    first, second = (from_network(draw(config, dataset, step, slice(0, 5000), CPU)[0], dataset.stats) for step in (0, 1))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(first.std(0), std, rtol=0.1, atol=0)
    assert draw(config, dataset, 0, slice(0, 5000), CPU)[0].std((0, 2, 3)).sub(0.5).abs().max() < 0.02


def test_unconditional_training_sees_the_null_label_alone():
    config, digits = digits_config(batch=8)
    config.model = DiTConfig(depth=1, width=16, heads=1, num_classes=0).fit(8, 1, 10)
    assert config.model.num_classes == 0 and (draw(config, digits, 0, slice(0, 8), CPU)[1] == 0).all()


def test_nonfinite_gradients_become_zero_and_are_counted():
    gradients = [torch.tensor([1.0, math.nan]), torch.tensor([[math.inf, -math.inf, 2.0]]), torch.tensor(3.0)]
    assert zero_nonfinite(gradients) == 2
    assert gradients[0].tolist() == [1, 0] and gradients[1].tolist() == [[0, 0, 2]] and gradients[2] == 3


def test_defaults_then_file_then_command_line(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text('steps = 7\nlearning_rate = 1\nema_stds = [0.2]\n[model]\nsize = "XS"\nheads = 8\n')
    config = load_config([f"--config={path}", "--steps=9", "--model.modulation=shift,gate", "--ema_stds=0.1,0.2",
                          "--compile=false", "--out=7", "--p_mean=-.5"])
    assert (config.steps, config.learning_rate, config.batch, config.out) == (9, 1.0, TrainConfig().batch, "7")
    assert config.model.modulation == ("shift", "gate") and config.ema_stds == (0.1, 0.2) and config.p_mean == -0.5
    assert (config.model.depth, config.model.width, config.model.heads, config.compile) == (6, 256, 8, False)


def test_a_saved_config_gives_the_same_config(tmp_path):
    config = load_config(["--steps=3", "--model.size=B", '--out=a "quoted" näme', "--model.num_classes=0"])
    save_config(config, tmp_path / "config.toml")
    assert load_config([f"--config={tmp_path / 'config.toml'}"]) == config


def test_every_key_is_documented():
    for name, field in config_keys().items():
        assert field.metadata["doc"], name


@pytest.mark.parametrize("text, message", [
    ("steps = [", "not valid TOML"),
    ("stepps = 3", "stepps: unknown key; did you mean 'steps'"),
    ("[model]\nwidht = 3", "model.widht: unknown key; did you mean 'model.width'"),
    ('steps = "many"', "steps: must be a whole number"),
    ("steps = true", "steps: must be a whole number"),
    ("compile = 1", "compile: must be true or false"),
    ("ema_stds = 0.1", "ema_stds: must be a list"),
    ("ema_stds = [0.3]", "ema_stds: 0.3 is not between"),
    ("ema_stds = [0.0625]", "ema_stds: 0.0625 is not between 0 and 0.289 with three decimals"),
    ("ema_stds = []", "ema_stds: must be one or more"),
    ("ema_stds = [0.1, 0.1]", "ema_stds: must be one or more different"),
    ("learning_rate = nan", "learning_rate: must be a number"),
    ("model = 3", "model: unknown key"),
    ("give_up_after = 0", "give_up_after: must be at least 1, not 0"),
    ("[model]\nwidth = 100\nheads = 3", "model.width: 100 is not divisible by heads = 3"),
    ('[model]\nmodulation = ["spin"]', "model.modulation: 'spin' is not one of rotate, scale, shift, gate"),
])
def test_a_bad_file_is_one_line_with_its_name_and_the_key(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_config([f"--config={path}"])
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize("argument, message", [
    ("--config=nowhere.toml", "--config: nowhere.toml: No such file"),
    ("--batch=ten", "--batch: must be a whole number, not 'ten'"),
    ("--bath=10", "--bath: unknown key; did you mean 'batch'"),
    ("--batch", "'--batch' is not of the form --key=value"),
    ("--model.width=97", "--model.width: 97 is not divisible by heads = 6"),
    ("--p_std=0", "--p_std: must be positive"),
])
def test_a_bad_argument_is_one_line_that_names_it(argument, message):
    with pytest.raises(ValueError) as error:
        load_config([argument])
    assert str(error.value).startswith(message)


def test_dataset_decides_the_shape_and_contradictions_are_refused():
    model = DiTConfig().fit(8, 3, 7)
    assert (model.image_size, model.channels, model.num_classes) == (8, 3, 7)
    assert model.fit(8, 3, 7) == model
    with pytest.raises(ValueError, match="model.channels: 3, but the dataset has 1"):
        model.fit(8, 1, 7)
    with pytest.raises(ValueError, match="model.patch: image_size = 9"):
        DiTConfig().fit(9, 3, 7)
    assert json.loads(json.dumps(dataclasses.asdict(model)))["modulation"] == ["rotate", "scale", "gate"]
