import numpy as np
import pytest
import torch
from PIL import Image

from model import Denoiser, DiTConfig
from sample import choose_snapshot, heun_sampler, newest_run, noise_levels, sample, save_grid, seeded_noise


def test_noise_levels_follow_edms_formula():
    sigmas = noise_levels(18)
    assert len(sigmas) == 19 and sigmas[-1] == 0
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    np.testing.assert_allclose(sigmas[:-1], expected, rtol=1e-12)


def gaussian_denoiser(mean, factor):
    """The ideal denoiser of Normal(mean, C), C = factor·factorᵀ: mean + C (C + sigma² I)^-1 (x - mean)."""
    covariance = factor @ factor.T

    def denoise(x, sigma, labels):
        gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(len(mean), dtype=x.dtype))
        return mean.view(x.shape[1:]) + ((x.flatten(1) - mean) @ gain.T).view(x.shape)

    return denoise


def test_heun_turns_noise_into_a_gaussian_of_the_right_mean_and_covariance():
    """The ODE is linear, so the sampler is x0 = A·noise + b exactly; A and b are read off from a basis."""
    torch.manual_seed(0)
    mean, factor = torch.randn(4, dtype=torch.float64) * 0.3, torch.randn(4, 4, dtype=torch.float64) * 0.4
    denoise = gaussian_denoiser(mean, factor)
    basis = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double().view(5, 1, 2, 2)

    def moments(steps):
        images = heun_sampler(denoise, basis, steps=steps).flatten(1)
        A = images[1:] - images[0]
        return images[0], A.T @ A

    at_mean, covariance = moments(256)
    # the exact ODE too leaves a share of about C/80² of the start's offset behind, since noise is centred on 0
    torch.testing.assert_close(at_mean, mean, rtol=0, atol=0.02 * mean.abs().max().item())
    torch.testing.assert_close(covariance, factor @ factor.T, rtol=0, atol=3e-4)


def test_heun_is_of_second_order_and_calls_the_denoiser_2n_minus_1_times():
    """x(sigma) = x(80)·sqrt((1 + sigma²) / (1 + 80²)) is the exact solution for data of unit variance."""
    calls, exact = [], 80 / (1 + 80**2) ** 0.5

    def denoise(x, sigma, labels):
        calls.append(sigma)
        return x / (1 + sigma**2)

    def error(steps):
        return abs(heun_sampler(denoise, torch.ones(1, 1, 1, 1, dtype=torch.float64), steps=steps).item() - exact)

    assert error(16) < 0.1 and len(calls) == 31 and calls[-1] == pytest.approx(0.002)
    assert 3.5 < error(64) / error(128) < 4.5                               # Euler would give 2


def test_labels_reach_the_denoiser_and_too_few_steps_are_refused():
    labels, seen = torch.tensor([3]), []
    heun_sampler(lambda x, sigma, given: seen.append(given) or x, torch.ones(1, 1, 1, 1), labels, steps=2)
    assert all(given is labels for given in seen)
    with pytest.raises(ValueError, match="at least 2 steps"):
        heun_sampler(lambda x, sigma, labels: x, torch.ones(1, 1, 1, 1), steps=1)


def test_noise_is_a_function_of_its_own_seed():
    noise = seeded_noise(range(10), (3, 4, 4))
    assert torch.equal(seeded_noise([7], (3, 4, 4))[0], noise[7])
    assert not torch.equal(noise[0], noise[1])


def test_images_do_not_depend_on_the_batch_they_are_drawn_in():
    torch.manual_seed(0)
    denoiser = Denoiser(DiTConfig(depth=1, width=16, heads=1, image_size=4, channels=1, num_classes=3)).eval()
    with torch.no_grad():
        denoiser.net.output.gain.fill_(1)
    stats, labels, seeds = {"mean": 100.0, "std": 60.0}, [0, 1, 2, 3, 0, 1, 2], list(range(7))
    whole = sample(denoiser, stats, labels, seeds, steps=4)
    pieces = sample(denoiser, stats, labels, seeds, steps=4, batch=3)
    assert whole.shape == (7, 1, 4, 4) and (whole.int() - pieces.int()).abs().max() <= 1
    assert not torch.equal(whole[0], whole[4])


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_grid_shows_every_image_in_its_place_enlarged_by_whole_pixels(tmp_path, channels, mode):
    images = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8)
    save_grid(images, columns=2, path=tmp_path / "new" / "grid.png")
    picture = Image.open(tmp_path / "new" / "grid.png")
    assert picture.mode == mode and picture.size == (2 * 66 + 2, 3 * 66 + 2)
    pixels = np.asarray(picture).reshape(3 * 66 + 2, 2 * 66 + 2, channels)
    for i in range(5):
        top, left = i // 2 * 66 + 2, i % 2 * 66 + 2
        tile = pixels[top:top + 64, left:left + 64]
        np.testing.assert_array_equal(tile[::8, ::8], images[i].permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(tile, tile[::8, ::8].repeat(8, 0).repeat(8, 1))


def test_runs_without_snapshots_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no run with a snapshot"):
        newest_run(tmp_path)
    with pytest.raises(ValueError, match="no snapshots"):
        choose_snapshot(tmp_path)
