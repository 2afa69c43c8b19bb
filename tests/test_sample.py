import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data import make_grid
from ema import reconstruct
from helpers import ROOT, awake, call, run
from model import Denoiser, DiTConfig
from plumbing.command import UserError
from plumbing.config import load_config
from plumbing.files import load_file, save_file
from plumbing.snapshots import load_snapshots, save_snapshot
from sample import check_guidance, deal_labels, find_label, guided, heun_sampler, load_denoiser, newest_run, sample
from train import TrainConfig


def test_heun_solves_the_ode_of_gaussian_data_to_second_order():
    """For Normal(m, v) the ideal denoiser is m + v / (v + sigma²)·(x - m), and the exact solution of the ODE is
    x(sigma) = m + (x(80) - m)·sqrt((v + sigma²) / (v + 80²)); here every pixel has a mean and a variance of its own."""
    torch.manual_seed(0)
    m, v, noise = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64).unbind()
    v, calls = v.exp(), []
    exact = m + (80 * noise - m) * (v / (v + 80**2)).sqrt()

    def denoise(x, sigma, labels):
        calls.append((sigma, labels))
        return m + v / (v + sigma**2) * (x - m)

    errors = {steps: (heun_sampler(denoise, noise, "labels", steps=steps) - exact).norm() for steps in (128, 64, 16)}
    assert errors[128] < 0.01 * exact.norm() and 3.5 < errors[64] / errors[128] < 4.5  # Euler would give 2
    assert len(calls) == 255 + 127 + 31 and calls[-1] == (pytest.approx(0.002), "labels")


def test_sampler_follows_edms_equation_5_and_algorithm_1():
    """Against the algorithm written down step by step."""
    torch.manual_seed(0)
    noise = torch.randn(2, 1, 2, 2, dtype=torch.float64)

    def denoise(x, sigma, labels):
        return x / (1 + sigma**2)

    x = noise * 80
    t = [(80 ** (1 / 7) + i / 7 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(8)] + [0]
    for i in range(8):
        d = (x - denoise(x, t[i], None)) / t[i]
        euler = x + (t[i + 1] - t[i]) * d
        x = x + (t[i + 1] - t[i]) * (d + (euler - denoise(euler, t[i + 1], None)) / t[i + 1]) / 2 if i < 7 else euler
    torch.testing.assert_close(heun_sampler(denoise, noise, steps=8), x, rtol=1e-10, atol=1e-12)


def make_denoiser(seed):
    torch.manual_seed(seed)
    denoiser = Denoiser(DiTConfig(depth=1, width=16, heads=1, image_size=4, channels=1, num_classes=3))
    return awake(denoiser).eval().requires_grad_(False)


MAIN, GUIDE, CPU = make_denoiser(0), make_denoiser(1), torch.device("cpu")
FACTS = {"mean": [100.0], "std": [60.0], "latent": False, "classes": ["ant", "bee", "7"], "counts": [5, 2, 3]}


def test_guidance_extrapolates_inside_its_interval():
    for count, sigma in ((5, 0.1), (5, 1.0), (5, 9.0)):
        x, labels, null = torch.randn(count, 1, 4, 4), torch.arange(count) % 3, torch.full((count,), 3)
        strong, free, weak = MAIN(x, sigma, labels), MAIN(x, sigma, null), GUIDE(x, sigma, labels)
        inside = 3 * strong - 2 * weak if sigma == 1.0 else strong  # lo < sigma <= hi
        for ours, expected in ((guided(MAIN, 0.0), free), (guided(MAIN, 3.0), 3 * strong - 2 * free),
                               (guided(MAIN, 3.0, GUIDE, interval=(0.1, 1.0)), inside)):
            torch.testing.assert_close(ours(x, sigma, labels), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(guided(MAIN, 1.0, GUIDE)(x, sigma, labels), strong)
        assert (strong - free).abs().max() > 1e-3 and (strong - weak).abs().max() > 1e-3


def test_guides_that_do_not_fit_are_refused():
    config = MAIN.net.config
    other = Denoiser(replace(config, num_classes=4))
    for ours, *guide in ((config, other, FACTS), (config, GUIDE, FACTS | {"mean": [1.0]}),
                         (replace(config, label_dropout=0.0),), (replace(config, num_classes=0),)):
        with pytest.raises(UserError, match="^--guid(e|ance): "):
            check_guidance(ours, FACTS, 2.0, *guide)
    check_guidance(config, FACTS, 2.0, GUIDE, FACTS), check_guidance(config, FACTS, 2.0)


def test_sample_scales_back_to_data_and_keeps_frames():
    labels, seeds = [0, 1, 2, 3, 0, 1, 2], range(7)  # 3: no label
    noise = torch.stack([torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    x = heun_sampler(MAIN, noise, torch.tensor(labels), steps=4)  # of standard deviation 0.5
    images = sample(MAIN, FACTS, labels, seeds, steps=4)
    assert torch.equal(images, (x * 120 + 100).round().clamp(0, 255).to(torch.uint8))
    latents = FACTS | {"latent": True}
    torch.testing.assert_close(sample(MAIN, latents, labels, seeds, steps=4), x * 120 + 100)
    frames = sample(GUIDE, FACTS, labels, seeds, frames=True, denoise=MAIN, steps=4)
    assert frames.shape == (7, 5, 1, 4, 4) and torch.equal(frames[:, -1], images)
    assert (frames[:, 0].float() - (noise * 60 + 100).clamp(0, 255)).abs().max() <= 1  # at sigma_max, the noise
    assert (frames[:, -2].float() - images.float()).abs().max() <= 3  # at sigma_min, almost the image


def test_an_image_depends_on_its_label_and_seed_alone():
    many = sample(MAIN, FACTS, [i % 3 for i in range(64)], range(64), steps=6)
    alone = sample(MAIN, FACTS, [1], [7], steps=6)
    assert (alone[0].int() - many[7].int()).abs().max() <= 1 and len(many.unique(dim=0)) == 64  # 1: rounding


def save_run(folder, denoiser, width=0.05, step=10):
    info = {"variant": "", "model": vars(denoiser.net.config), "data": FACTS}
    return save_snapshot(folder / "ema", denoiser, step, width, info)


def test_newest_run_and_widest_average_are_the_defaults(tmp_path):
    assert newest_run(tmp_path) == ROOT / "pretrained" / "digits.pt"
    os.utime(save_run(tmp_path / "c", MAIN), (10**9, 10**9))
    for step in (10, 20):
        narrow, wide = (save_run(tmp_path / "a" / "b", net, std, step) for net, std in ((MAIN, 0.05), (GUIDE, 0.1)))
    run = newest_run(tmp_path)
    mixed, = reconstruct(load_snapshots(run / "ema"), [0.07])  # not tracked: mixed in memory
    for args, expected in (((run, CPU), load_file(wide)), ((run / "ema", CPU, 0.05), load_file(narrow)),
                           ((narrow, CPU), load_file(narrow)), ((run, CPU, 0.07), mixed)):
        denoiser, facts = load_denoiser(*args)
        assert facts == FACTS and not denoiser.training
        assert all(torch.equal(w, expected["weights"][name].float()) for name, w in denoiser.state_dict().items())
    assert run == tmp_path / "a" / "b" and len(list(run.rglob("*.pt"))) == 4


def test_what_is_no_run_or_snapshot_is_one_line_that_names_it(tmp_path):
    config, path = vars(MAIN.net.config), save_run(tmp_path, MAIN)
    whole = {name: value for name, value in load_file(path).items() if name != "sha256"}
    weights = {name: weight for name, weight in whole["weights"].items() if not name.endswith("up.weight")}
    infos = ({"model": {}}, {"model": config | {"width": 10**3}}, {"model": config | {"depth": "x"}}, {"variant": "os"},
             {"model": config | {"new": 1}}, {"data": {}}, {"data": FACTS | {"std": [float("nan")]}},
             {"data": FACTS | {"classes": ["ant"]}})
    for change in ({"weights": weights}, *({"info": whole["info"] | info} for info in infos)):
        save_file(path, whole | change)
        with pytest.raises(UserError, match=f"^[^\n]*{path.name}[^\n]*$"):
            load_denoiser(path, CPU)
    for content in ({"step": 3}, {"info": whole["info"]}, whole | {"weights": [1]}, whole | {"weights": {"w": 1}}):
        save_file(path, content)
        with pytest.raises(UserError, match=f"^[^\n]*{path.name}: [^\n]*$"):
            load_denoiser(path, CPU)
    with pytest.raises(UserError, match=f"{path.name}: is one snapshot; to choose an EMA width, name the run"):
        load_denoiser(path, CPU, 0.05)


def test_labels_are_dealt_as_often_as_they_occur_in_the_data():
    for counts in ([5, 2, 3], [1] * 10, [60, 1]):
        for numbers in (range(1000), range(500, 1000)):
            dealt = np.bincount(deal_labels(counts, numbers), minlength=len(counts))
            np.testing.assert_allclose(dealt, np.array(counts) / sum(counts) * len(numbers), atol=2.5)
    assert deal_labels([9], [3, 4]).tolist() == [0, 0]
    assert [find_label(name, ["1", "0", "ant"]) for name in ("1", "0", "ant")] == [0, 1, 2]
    assert [find_label(name, ["ant", "bee"]) for name in ("0", "1", "bee")] == [0, 1, 1]


def test_every_option_of_the_command_reaches_the_sampler(tmp_path, monkeypatch):
    def draw(words):
        options = ["--steps=4", "--columns=2", f"--out={tmp_path / 'a.npz'}", *words.split()]
        assert call("sample.py", tmp_path, *options).returncode == 0
        with np.load(tmp_path / "a.npz") as file:
            return file["arr_0"].tobytes(), tuple(file["labels"])

    compiled = []
    monkeypatch.setattr("sample.check_compiler", print)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(net))  # test_model.py compiles
    save_run(tmp_path, MAIN, 0.05, 20), save_run(tmp_path, GUIDE, 0.1, 20), save_run(tmp_path / "other", MAIN)
    plain, *others = [draw(words) for words in (
        "", "--guidance=3", "--guidance=3 --guide-ema=0.05", f"--guidance=2 --guide={tmp_path / 'other'}", "--seed=3",
        "--guidance=3 --guidance-interval 0.3 9", "--ema=0.05", "--ema=0.07", "--count=6", "--labels 7 bee ant",
        "--labels ant", "--columns=3", "--steps=5")]
    assert plain not in others and len(set(others)) == len(others) and plain[1] == (0, 0, 1, 1, 2, 2)
    assert "needs --guidance" in call("sample.py", tmp_path, "--guidance-interval", 1, 2).stderr
    for words in ("--guidance=1 --ema=0.1 --labels ant bee 7 --seed=0", f"--guidance=3 --guide={tmp_path}",
                  "--compile --precision=float32"):
        assert draw(words) == plain  # the defaults; guided by itself
    assert len(compiled) == 1


def test_grid_animation_and_pictures_are_of_the_same_images(tmp_path):
    run, grid, numbered = save_run(tmp_path / "run", MAIN), tmp_path / "run" / "grid.png", tmp_path / "numbered"
    for words, out in (("--gif", grid), (f"--out={numbered}", numbered)):
        assert call("sample.py", run, "--steps=3", "--columns=2", "--seed=5", words).stdout.strip() == str(out)
    pictures = [np.array(Image.open(numbered / f"{seed:06d}.png")) for seed in range(5, 11)]
    images, movie = torch.tensor(np.stack(pictures))[:, None], Image.open(grid.with_suffix(".gif"))
    assert len(images.unique(dim=0)) == 6  # each of a seed of its own
    expected, plain = (np.asarray(make_grid(images, 2, names)) for names in (FACTS["classes"], ()))
    assert np.array_equal(Image.open(grid), expected) and 3 <= movie.n_frames <= 4 and movie.info["loop"] == 0
    assert np.array_equal(plain[2 + 66:, 2 + 66:][:64:16, :64:16], pictures[3])  # row 1, column 1
    margin = expected.shape[1] - plain.shape[1]  # names stand at the left of their rows
    assert np.array_equal(expected[:, margin:], plain)
    assert all((expected[top:top + 66, :margin] > 200).any() for top in (0, 66, 132))
    movie.seek(movie.n_frames - 1)  # two that are equal are one of twice the time
    np.testing.assert_allclose(np.asarray(movie.convert("L")), expected, atol=2)
    for words in (f"--out={numbered}", "--columns=10000", "--out=a.jpg", "--labels ant 3", "--labels 1",
                  "--gif --out=a.npz"):
        result = call("sample.py", run, *words.split())
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and words[:5] in result.stderr, words


def test_levels_outside_the_formulas_domain_are_refused():
    noise = torch.randn(2, 1, 4, 4)
    for levels, said in ((dict(steps=1), "^steps: "), (dict(steps=0), "^steps: "), (dict(sigma_min=0.0), "^sigma_min"),
                         (dict(sigma_min=80.0, sigma_max=0.002), "^sigma_min"), (dict(rho=0), "^rho: ")):
        with pytest.raises(ValueError, match=said):
            heun_sampler(MAIN, noise, **levels)
    exact = heun_sampler(MAIN, noise, steps=4)
    torch.testing.assert_close(heun_sampler(MAIN, noise.double(), steps=4), exact.double(), rtol=1e-3, atol=1e-3)
    assert heun_sampler(MAIN, noise.half(), steps=4).dtype == torch.float32


def test_many_small_jobs_draw_what_a_large_one_does(tmp_path):
    run = save_run(tmp_path / "run", MAIN).parent.parent
    for name, words in (("all", "--count=7 --seed=3"), ("a", "--count=4 --seed=3"), ("b", "--count=3 --seed=7")):
        assert call("sample.py", run, "--steps=2", *words.split(), f"--out={tmp_path / name}.npz").returncode == 0
    whole, *parts = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("all", "a", "b"))
    for name in ("labels", "arr_0"):
        np.testing.assert_allclose(np.concatenate([part[name] for part in parts]).astype(int), whole[name].astype(int),
                                   atol=name == "arr_0")
    assert whole["classes"].tolist() == FACTS["classes"]  # what the labels mean


def test_the_home_directory_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_run(tmp_path / "run", MAIN)
    assert call("sample.py", "~/run", "--steps=2", "--columns=1", "--out=~/new/a.png").returncode == 0
    assert (tmp_path / "new" / "a.png").is_file()
    assert TrainConfig(out="~/run", dataset="~/set").out == str(tmp_path / "run")
    (tmp_path / "keys.toml").write_text("seed = 5")
    assert load_config(TrainConfig, ["--config=~/keys.toml"]).seed == 5


def test_latents_without_a_decoder_are_refused_before_they_are_drawn(tmp_path):
    latents = Denoiser(replace(MAIN.net.config, channels=16))
    facts = FACTS | {"latent": True, "mean": [0.0] * 16, "std": [1.0] * 16}
    info = {"variant": "", "model": vars(latents.net.config), "data": facts}
    save_snapshot(tmp_path / "ema", latents, 5, 0.1, info)
    result = call("sample.py", tmp_path, "--columns=1", f"--out={tmp_path / 'a.png'}")
    assert result.returncode == 2 and "16 channels, and the decoder here, sd-vae-ft-mse, is for 4" in result.stderr
    assert call("sample.py", tmp_path, "--columns=1", "--steps=2", f"--out={tmp_path / 'a.npz'}").returncode == 0
