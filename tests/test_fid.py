import re

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import data
from fid import frechet_distance, load_inception, resize
from helpers import Job, call, second_inception
from plumbing.command import UserError

PIXELS = np.random.default_rng(0).integers(160, 256, (40, 4, 4), dtype=np.uint8)  # as features: a mean far from 0
FLAT = PIXELS.reshape(40, 16).astype(np.float32) / np.float32(127.5) - 1


def test_distance_agrees_with_sqrtm_and_closed_forms():
    generator = np.random.default_rng(0)
    for size in (2, 10, *range(30, 51)):
        mu1, mu2 = generator.normal(size=(2, size))
        sigma1, sigma2 = (np.cov(generator.normal(size=(size, 2 * size))) for _ in range(2))
        root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
        expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
        assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-8)
        assert frechet_distance(mu1, sigma1, mu1, sigma1) == 0  # exactly
        assert 0 <= frechet_distance(mu1, sigma1, mu1 + 1e-12, sigma1) < 1e-11  # not negative by rounding
        assert frechet_distance(mu1, sigma1, mu2, sigma1) == pytest.approx(((mu1 - mu2) ** 2).sum(), rel=1e-9)
    zero, u, v = np.zeros(8), *generator.normal(size=(2, 8))  # singular: along one vector each
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(expected, rel=1e-7)
    zero, low = np.zeros(200), np.cov(generator.normal(size=(200, 20)))  # of rank 19
    assert frechet_distance(zero, low, zero, 4 * low) == pytest.approx(np.trace(low), rel=1e-7)


def test_resize_is_that_of_tensorflow_1():
    """Pixel i of n is read at i·N/n, linearly between two pixels; beyond the last one it is the last one."""
    for height, width, size in ((8, 8, 19), (20, 13, 16), (5, 40, 11)):
        image = expected = np.random.default_rng(0).random((1, 2, height, width))
        for axis, length in ((2, height), (3, width)):
            points = np.arange(size) * length / size, np.arange(length)
            expected = np.apply_along_axis(lambda row: np.interp(*points, row), axis, expected)
        np.testing.assert_allclose(resize(torch.from_numpy(image), size), expected, atol=1e-12)


@torch.no_grad()
def test_inception_takes_the_public_layout_and_agrees(tmp_path):
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected, weights = second_inception((resize(images.float(), 299) - 128) / 128)
    torch.save(weights, tmp_path / "weights.pth")
    ours = load_inception(tmp_path / "weights.pth")(images)
    assert ours.shape == (1, 2048) and expected.std() > 0.01
    # The second writing does not fold the batch normalization, so this also says that folding changes nothing.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    weights = {name: torch.zeros(()).expand(value.shape) for name, value in weights.items()}
    fewer = {name: value for name, value in weights.items() if name != "Mixed_7c.branch_pool.bn.bias"}
    more = {"AuxLogits.fc.bias": torch.zeros(1000)}
    for wrong in (fewer, weights | more, weights | {"fc.bias": torch.zeros(1000)}):
        torch.save(wrong, tmp_path / "weights.pth")
        with pytest.raises(UserError, match="weights.pth: has other names or shapes"):
            load_inception(tmp_path / "weights.pth")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder we are in, with the same 40 grey images as a folder, as an npz and as sets/ready, a prepared set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.DATASETS", tmp_path / "sets")
    (tmp_path / "sets").mkdir(), (tmp_path / "folder").mkdir()
    for i, image in enumerate(PIXELS):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    np.savez(tmp_path / "samples.npz", arr_0=PIXELS[..., None])
    assert call("data.py", "samples.npz", "--name=ready", "--holdout=0").returncode == 0
    return tmp_path


@pytest.mark.parametrize("processes", [1, 2])
def test_statistics_are_mean_and_covariance_of_any_source(folder, processes):
    words = ["fid.py", "stats", folder / "samples.npz", "--features=pixels", "--batch=7", f"--out={folder / 's.npz'}"]
    assert Job(*[words] * processes).finish().returncode == [0] * processes
    mu, sigma = FLAT.mean(0, dtype=float), np.cov(FLAT.T.astype(float))
    with np.load("s.npz") as file:
        assert file["count"] == 40
        np.testing.assert_allclose(file["mu"], mu, rtol=0, atol=1e-10)
        np.testing.assert_allclose(file["sigma"], sigma, rtol=0, atol=1e-10)
    np.savez("other.npz", mu=mu + 2, sigma=sigma)  # no count: as pytorch-fid writes it
    for a, b, expected in (("folder", "samples.npz", 0), ("s.npz", "folder", 0), ("other.npz", "sets/ready", 64)):
        result = call("fid.py", "compare", a, b, "--features=pixels")
        assert float(result.stdout) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert f"warning: {b}: 40 images are few for 16" in result.stderr and "warning: other" not in result.stderr


MODULE = """
import torch

class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(images.float().mean(dim=(2, 3))) * self.scale
"""


def test_features_of_a_module_are_strict_and_in_eval_mode(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "means.py").write_text(MODULE)
    (folder / "infinite.py").write_text(MODULE.replace(" * self.scale", " / 0"))
    (folder / "needs.py").write_text("import nonexistent_thing")
    (folder / "flat.py").write_text(MODULE.replace(".mean(dim=(2, 3))", "").replace(" * self.scale", ".mean()"))
    torch.save({"scale": torch.tensor([1.0, 2, 4]).half()}, "scale.pt")
    torch.save({"scale": torch.ones(2)}, "other.pt")
    assert call("fid.py", "stats", "folder", "--features=means:scale.pt", "--out=stats.npz").stdout == "stats.npz\n"
    with np.load("stats.npz") as file:
        np.testing.assert_allclose(file["mu"], PIXELS.mean() * np.array([1, 2, 4]), rtol=1e-6)  # grey became RGB
        variance = PIXELS.mean((1, 2)).var(ddof=1) * np.outer([1, 2, 4], [1, 2, 4])
        np.testing.assert_allclose(file["sigma"], variance, rtol=1e-5)
    for features, said in (("means", "MODULE:FILE"), ("nowhere:scale.pt", "no module nowhere"),
                           ("math:scale.pt", "no class"),
                           ("means:other.pt", "other.pt: .*scale"), ("means:means.py", "means.py: "),
                           ("means:nowhere.pt", "nowhere.pt: there is no such file"), ("flat:scale.pt", "must map"),
                           ("infinite:scale.pt", "must map")):
        result = call("fid.py", "stats", "folder", f"--features={features}", "--out=stats.npz")
        assert result.returncode == 2 and re.search(said, result.stderr.splitlines()[-1]), result.stderr
    with pytest.raises(ModuleNotFoundError, match="nonexistent_thing"):  # a bug in the module
        call("fid.py", "stats", "folder", "--features=needs:scale.pt", "--out=stats.npz")


def test_bad_input_is_one_line_that_names_it(folder):
    for name, mu in (("code", [{}] * 3), ("small", np.zeros(3)), ("odd", np.zeros(4)), ("nan", [np.nan] * 3)):
        np.savez(f"{name}.npz", mu=mu, sigma=np.eye(3))
    np.savez("large.npz", arr_0=np.zeros((2, 129, 129, 1), np.uint8))
    (folder / "text.npz").write_text("hello")
    (folder / "ready").mkdir()  # a set is called so too
    for words in [f"--features=pixels {name}.npz" for name in ("text", "code", "small", "odd", "nan", "nowhere")] + [
            "folder --features=text.npz"] + [
            "--features=pixels ready", "large.npz --features=pixels large.npz"]:
        result = call("fid.py", "compare", "folder", *words.split())
        line, name = result.stderr.splitlines()[-1], words.replace("=", " ").split()[-1]
        assert result.returncode == 2 and line.startswith("fid.py: ") and name in line, (words, result.stderr)


def test_statistics_of_other_features_are_not_compared(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "means.py").write_text(MODULE)
    for name in ("one", "two"):
        torch.save({"scale": torch.rand(3)}, f"{name}.pt")
        assert call("fid.py", "stats", "folder", f"--features=means:{name}.pt", f"--out={name}.npz").returncode == 0
    result = call("fid.py", "compare", "one.npz", "two.npz", "--features=means:one.pt")
    assert result.returncode == 2 and "one.npz has features means:" in result.stderr, result.stderr
    assert call("fid.py", "compare", "one.npz", "folder", "--features=means:one.pt").stdout == "0\n"


def test_a_raw_source_and_the_set_made_of_it_are_the_same_images(folder, monkeypatch):
    images = PIXELS.repeat(2, 1).repeat(2, 2)
    np.savez("parts.npz", x_train=images[:30], x_test=255 - images[30:], y_train=np.arange(30), y_test=np.arange(10))
    monkeypatch.setattr(data, "DATASETS", folder / "sets")
    assert call("data.py", "parts.npz", "--name=prepared").returncode == 0
    np.savez("gen.npz", arr_0=images[:30])
    for other in ("prepared", "parts.npz"):
        result = call("fid.py", "compare", "gen.npz", other, "--features=pixels")
        assert result.stdout == "0\n" and f"{other}: 30 images" in result.stderr
    assert "those to train on, of 40" in result.stderr
    (folder / "wide").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(np.pad(image, ((0, 0), (4, 4)))).save(folder / "wide" / f"{i}.png")
    assert call("data.py", "wide", "--name=square", "--holdout=0").returncode == 0
    assert call("fid.py", "compare", "wide", "square", "--features=pixels").stdout == "0\n"
