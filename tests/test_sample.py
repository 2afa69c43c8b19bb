import numpy as np
import pytest
import torch
from PIL import Image

from model import Denoiser, DiTConfig
from ema import save_snapshot
from sample import (check_guidance, gather, guided, heun_sampler, load_denoiser, main, newest_run, noise_levels, sample,
                    save_animation, save_grid, seeded_noise, use_threads)


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


def test_churn_follows_edms_algorithm_2():
    """Against the algorithm written down step by step with the same noise."""
    torch.manual_seed(0)
    noise, fresh = torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.randn(8, 2, 1, 2, 2, dtype=torch.float64)
    denoise, given = (lambda x, sigma, labels: x / (1 + sigma**2)), iter(fresh)
    ours = heun_sampler(denoise, noise, steps=8, churn=2.0, churn_interval=(0.05, 50), churn_noise=1.1, draw=lambda: next(given))
    t, x, used = noise_levels(8).tolist(), noise * 80, 0
    for i in range(8):
        gamma = min(2.0 / 8, 2**0.5 - 1) if 0.05 <= t[i] <= 50 else 0
        t_hat = t[i] + gamma * t[i]
        if gamma:
            x, used = x + (t_hat**2 - t[i] ** 2) ** 0.5 * 1.1 * fresh[used], used + 1
        d = (x - denoise(x, t_hat, None)) / t_hat
        x, previous = x + (t[i + 1] - t_hat) * d, x
        if t[i + 1]:
            x = previous + (t[i + 1] - t_hat) * (d + (x - denoise(x, t[i + 1], None)) / t[i + 1]) / 2
    assert 0 < used < 8
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-12)


def test_churn_keeps_the_distribution():
    """Samples of the unit Gaussian still have variance 1, though each differs from the deterministic one."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 200, 200, generator=generator, dtype=torch.float64)
    denoise, draw = (lambda x, sigma, labels: x / (1 + sigma**2)), (lambda: torch.randn(noise.shape, generator=generator).double())
    plain, churned = heun_sampler(denoise, noise, steps=256), heun_sampler(denoise, noise, steps=256, churn=60, draw=draw)
    assert churned.var() == pytest.approx(1, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([plain.flatten(), churned.flatten()]))[0, 1]) < 0.5


@pytest.fixture(scope="module")
def denoisers():
    """Two small networks that draw something, the second unlike the first."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        denoiser = Denoiser(DiTConfig(depth=1, width=16, heads=1, image_size=4, channels=1, num_classes=3)).eval()
        with torch.no_grad():
            denoiser.net.output.gain.fill_(1)
            for name, parameter in denoiser.named_parameters():
                if "modulate" in name and name.endswith("gain"):
                    parameter.fill_(0.5)
        made.append(denoiser)
    return made


STATS = {"mean": 100.0, "std": 60.0, "latent": False}


def test_guidance_extrapolates_inside_its_interval_and_is_nothing_at_1(denoisers):
    main, guide = denoisers
    x, labels, null = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1]), torch.full((5,), 3)
    with torch.no_grad():
        for sigma in (0.1, 1.0, 9.0):
            strong, free, weak = main(x, sigma, labels), main(x, sigma, null), guide(x, sigma, labels)
            assert torch.equal(guided(main, 1.0)(x, sigma, labels), strong)
            assert torch.equal(guided(main, 1.0, guide)(x, sigma, labels), strong)
            assert torch.equal(guided(main, 3.0, main)(x, sigma, labels), strong)           # by itself
            torch.testing.assert_close(guided(main, 0.0)(x, sigma, labels), free)
            torch.testing.assert_close(guided(main, 3.0)(x, sigma, labels), 3 * strong - 2 * free, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(guided(main, 3.0, guide)(x, sigma, labels), 3 * strong - 2 * weak, rtol=1e-4, atol=1e-5)
            inside = torch.equal(guided(main, 3.0, guide, interval=(0.1, 1.0))(x, sigma, labels), strong)
            assert inside == (sigma != 1.0)                                 # lo < sigma <= hi
        assert (strong - free).abs().max() > 1e-3


def test_guides_that_do_not_fit_are_refused(denoisers):
    config = vars(denoisers[0].net.config)
    with pytest.raises(ValueError, match="num_classes = 4, but the run has 3"):
        check_guidance(denoisers[0], STATS, 2.0, Denoiser(DiTConfig(**{**config, "num_classes": 4})), STATS)
    with pytest.raises(ValueError, match="another mean"):
        check_guidance(denoisers[0], STATS, 2.0, denoisers[1], {"mean": 1.0, "std": 1.0})
    with pytest.raises(ValueError, match="without null labels"):
        check_guidance(Denoiser(DiTConfig(**{**config, "label_dropout": 0.0})), STATS, 2.0)
    with pytest.raises(ValueError, match="no labels"):
        check_guidance(Denoiser(DiTConfig(**{**config, "num_classes": 0})), STATS, 2.0)
    check_guidance(denoisers[0], STATS, 2.0, denoisers[1], STATS)
    check_guidance(denoisers[0], STATS, 2.0)


def test_noise_is_a_function_of_its_own_seed_and_new_at_every_call():
    draw, alone = seeded_noise(range(10), (3, 4, 4)), seeded_noise([7], (3, 4, 4))
    first, second = draw(), draw()
    assert torch.equal(alone()[0], first[7]) and torch.equal(alone()[0], second[7])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)


@pytest.mark.parametrize("churn", [0.0, 5.0])
def test_the_image_of_a_seed_is_the_same_alone_and_in_a_batch_of_64(denoisers, churn):
    def draw_image(seeds, labels):
        draw = seeded_noise(seeds, (1, 4, 4))
        return heun_sampler(denoisers[0], draw(), torch.tensor(labels), steps=6, churn=churn, draw=draw)

    together = draw_image(range(64), [seed % 3 for seed in range(64)])
    torch.testing.assert_close(draw_image([7], [1])[0], together[7], rtol=0, atol=1e-5)


def test_sample_yields_batches_of_pixels_and_frames(denoisers):
    labels, seeds = [0, 1, 2, 3, 0, 1, 2], list(range(7))
    whole, = sample(denoisers[0], STATS, labels, seeds, steps=4)
    pieces = list(sample(denoisers[0], STATS, labels, seeds, batch=3, steps=4))
    assert [len(piece) for piece in pieces] == [3, 3, 1] and whole.shape == (7, 1, 4, 4) and whole.dtype == torch.uint8
    assert (whole.int() - torch.cat(pieces).int()).abs().max() <= 1 and not torch.equal(whole[0], whole[4])
    frames, = sample(denoisers[0], STATS, labels, seeds, frames=True, steps=4)
    assert frames.shape == (7, 5, 1, 4, 4) and torch.equal(frames[:, -1], whole)
    noise = seeded_noise(seeds, (1, 4, 4))()                                # at sigma_max the picture is the noise
    assert (frames[:, 0].float() - (noise * 60 + 100).clamp(0, 255)).abs().max() <= 1


def test_what_the_processes_made_is_put_back_in_order(monkeypatch):
    images = torch.arange(7)[:, None]
    shares = [torch.cat([images[rank::3], images.new_zeros(3 - len(images[rank::3]), 1)]) for rank in range(3)]
    monkeypatch.setattr("sample.dist.all_gather", lambda parts, mine: [p.copy_(s) for p, s in zip(parts, shares)])
    for rank in range(3):
        assert torch.equal(gather(images[rank::3], 7, rank, 3), images)


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


def test_animation_ends_with_the_images(tmp_path):
    frames = torch.randint(0, 256, (4, 6, 1, 8, 8), dtype=torch.uint8)
    save_animation(frames, columns=2, path=tmp_path / "a.gif")
    save_grid(frames[:, -1], columns=2, path=tmp_path / "a.png")
    movie = Image.open(tmp_path / "a.gif")
    assert movie.n_frames == 6 and movie.info["loop"] == 0
    movie.seek(5)
    np.testing.assert_allclose(np.asarray(movie.convert("L")), np.asarray(Image.open(tmp_path / "a.png")), atol=2)


def save_run(folder, denoiser, width=0.05, step=10):
    info = {"model": vars(denoiser.net.config), "data": STATS}
    return save_snapshot(folder / "ema", denoiser, step, width, info)


def test_a_run_directory_gives_its_widest_or_the_width_asked_for_and_a_file_itself(tmp_path, denoisers):
    cpu = torch.device("cpu")
    for std, denoiser in zip((0.05, 0.1), denoisers):
        path = save_run(tmp_path, denoiser, std)
    for args, expected in (((tmp_path, cpu), 1), ((tmp_path, cpu, 0.05), 0), ((path, cpu), 1)):
        loaded, stats = load_denoiser(*args)
        assert stats == STATS and not loaded.training
        torch.testing.assert_close(loaded.net.output.linear.weight, denoisers[expected].net.output.linear.weight, rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="is one snapshot"):
        load_denoiser(path, cpu, 0.05)


def test_a_width_between_is_reconstructed_once_and_weights_come_back_at_rms_1(tmp_path, denoisers):
    for step in (10, 20):
        for std, denoiser in zip((0.05, 0.1), denoisers):
            save_run(tmp_path, denoiser, std, step)
    kept = tmp_path / "ema" / "posthoc" / "0000020-0.070.pt"
    denoiser, _ = load_denoiser(tmp_path, torch.device("cpu"), 0.07)
    torch.testing.assert_close(denoiser.net.blocks[0].mlp.up.weight.square().mean(1), torch.ones(64))
    made = kept.stat().st_mtime_ns
    load_denoiser(tmp_path, torch.device("cpu"), 0.07)
    assert kept.stat().st_mtime_ns == made
    save_run(tmp_path, denoisers[0], 0.05, 20)                              # a newer snapshot makes the kept one stale
    load_denoiser(tmp_path, torch.device("cpu"), 0.07)
    assert kept.stat().st_mtime_ns > made


def test_runs_without_snapshots_and_snapshots_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no run with a snapshot"):
        newest_run(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such run or snapshot"):
        load_denoiser(tmp_path / "nowhere", torch.device("cpu"))
    with pytest.raises(ValueError, match="no snapshots"):
        load_denoiser(tmp_path, torch.device("cpu"))
    path = save_snapshot(tmp_path, torch.nn.Linear(2, 2), 1, 0.05)
    with pytest.raises(ValueError, match="0000001-0.050.pt: no denoiser of this code"):
        load_denoiser(path, torch.device("cpu"))


def picture(monkeypatch, capsys, *words):
    """What the command draws with these options, in this process: the bytes of its npz."""
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, words)])
    main()
    out = capsys.readouterr().out.strip()
    with np.load(out) as file:
        return file["arr_0"].tobytes()


def test_every_option_of_the_command_reaches_the_sampler(tmp_path, denoisers, monkeypatch, capsys):
    for std, denoiser in zip((0.05, 0.1), denoisers):
        save_run(tmp_path, denoiser, std, 20)
    early = save_run(tmp_path / "other", denoisers[0], 0.05, 10)
    options = [tmp_path, "--steps=4", "--columns=2", f"--out={tmp_path / 'a.npz'}"]
    variants = [[], ["--guidance=3"], ["--guidance=3", "--guide-ema=0.05"], ["--guidance=2", f"--guide={early}"], ["--guidance=3", "--guidance-interval", "0.3", "9"],
                ["--churn=3"], ["--churn=3", "--churn-interval", "0.1", "60"], ["--churn=3", "--churn-noise=1.5"], ["--ema=0.05"],
                ["--ema=0.07"], ["--seed=3"], ["--labels", "2", "1", "0"], ["--steps=5"]]
    drawn = [picture(monkeypatch, capsys, *options, *variant) for variant in variants]
    assert len(set(drawn)) == len(variants)
    assert picture(monkeypatch, capsys, *options, "--guidance=1", "--churn=0", "--ema=0.1", "--labels", "0", "1", "2") == drawn[0]
    assert picture(monkeypatch, capsys, *options, "--guidance=3", f"--guide={tmp_path}") == drawn[0]        # guided by itself


def test_the_threads_of_the_run_are_taken(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    for text in ("threads = 3", "threads = 0", "threads = 'x'", "other = 1", "not TOML"):
        (tmp_path / "config.toml").write_text(text)
        use_threads(tmp_path)
    use_threads(tmp_path / "none")
    assert taken == [3]
