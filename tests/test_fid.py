import hashlib
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import fid
from fid import FeatureStatistics, Inception, frechet_distance, load_inception, resize


# ---- the distance ----

def random_covariance(generator, size, rank=None):
    factor = generator.normal(size=(size, rank or 2 * size))
    return factor @ factor.T / factor.shape[1]


def test_distance_agrees_with_the_matrix_square_root_where_that_works():
    generator = np.random.default_rng(0)
    for size in (2, 10, 50):
        mu1, mu2 = generator.normal(size=(2, size))
        sigma1, sigma2 = random_covariance(generator, size), random_covariance(generator, size)
        root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
        expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
        assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-8)


def test_distance_has_its_closed_forms():
    generator = np.random.default_rng(1)
    zero, mu = np.zeros(8), generator.normal(size=8)
    sigma = random_covariance(generator, 8)
    assert frechet_distance(mu, sigma, mu, sigma) == 0                      # identical: exactly
    assert frechet_distance(zero, sigma, mu, sigma) == pytest.approx((mu**2).sum(), rel=1e-10)
    a, b = generator.uniform(0.1, 3, size=(2, 8))
    assert frechet_distance(zero, np.diag(a), zero, np.diag(b)) == pytest.approx(((a**0.5 - b**0.5) ** 2).sum(), rel=1e-10)
    assert frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]])) == pytest.approx(4 + 1)
    # singular covariances in general position: a line along u against a line along v, and a line against a plane
    u, v = np.linalg.qr(generator.normal(size=(8, 2)))[0].T
    v = (u + v) / 2**0.5
    expected = 4 + 9 - 2 * 2 * 3 * abs(u @ v)
    assert frechet_distance(zero, 4 * np.outer(u, u), zero, 9 * np.outer(v, v)) == pytest.approx(expected, rel=1e-7)
    low = random_covariance(generator, 200, rank=20)
    assert frechet_distance(np.zeros(200), low, np.zeros(200), 4 * low) == pytest.approx(np.trace(low), rel=1e-7)


# ---- statistics ----

def test_streamed_covariance_equals_numpys_for_a_large_mean_and_a_small_variance():
    features = np.random.default_rng(0).normal(size=(1000, 12)) * 1e-2 + 1e4
    for sizes in ([1000], [1, 2, 7, 490, 500], [100] * 10):
        seen = FeatureStatistics()
        for part in torch.from_numpy(features).split(sizes):
            seen.update(part)
        mu, sigma, count = seen.finish()
        exact = np.cov((features - 1e4).T)
        assert count == 1000 and np.abs(mu - features.mean(0)).max() < 1e-10
        assert np.abs(sigma - exact).max() / np.abs(exact).max() < 1e-10


def test_statistics_of_parts_merge_into_those_of_the_whole():
    features = torch.randn(90, 5, dtype=torch.float64) + 3
    whole, joined = FeatureStatistics(), FeatureStatistics()
    whole.update(features)
    for part in (features[0::3], features[1::3], features[2::3]):
        one = FeatureStatistics()
        one.update(part)
        joined.merge(one)
    joined.merge(FeatureStatistics())
    for ours, theirs in zip(joined.finish(), whole.finish()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


# ---- the network ----

def test_resize_is_that_of_tensorflow_1():
    generator = torch.Generator().manual_seed(0)
    for height, width, size in ((8, 8, 19), (20, 13, 16), (5, 40, 11)):
        x = torch.rand(1, 2, height, width, generator=generator)
        ours = resize(x, size)
        for i in range(size):
            for j in range(size):
                y, z = i * height / size, j * width / size
                y0, z0 = int(y), int(z)
                y1, z1 = min(y0 + 1, height - 1), min(z0 + 1, width - 1)
                top = x[..., y0, z0] + (x[..., y0, z1] - x[..., y0, z0]) * (z - z0)
                bottom = x[..., y1, z0] + (x[..., y1, z1] - x[..., y1, z0]) * (z - z0)
                torch.testing.assert_close(ours[..., i, j], top + (bottom - top) * (y - y0), rtol=0, atol=1e-6)


# the public file, written down once more: name, channels in and out, kernel
STEM = [("Conv2d_1a_3x3", 3, 32, 3, 3), ("Conv2d_2a_3x3", 32, 32, 3, 3), ("Conv2d_2b_3x3", 32, 64, 3, 3),
        ("Conv2d_3b_1x1", 64, 80, 1, 1), ("Conv2d_4a_3x3", 80, 192, 3, 3)]


def convolutions():
    yield from STEM
    for name, n, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        for branch, i, o, k in (("branch1x1", n, 64, 1), ("branch5x5_1", n, 48, 1), ("branch5x5_2", 48, 64, 5), ("branch3x3dbl_1", n, 64, 1),
                                ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3), ("branch_pool", n, pool, 1)):
            yield f"{name}.{branch}", i, o, k, k
    for branch, i, o, k in (("branch3x3", 288, 384, 3), ("branch3x3dbl_1", 288, 64, 1), ("branch3x3dbl_2", 64, 96, 3),
                            ("branch3x3dbl_3", 96, 96, 3)):
        yield f"Mixed_6a.{branch}", i, o, k, k
    for name, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        for branch, i, o, kh, kw in (("branch1x1", 768, 192, 1, 1), ("branch7x7_1", 768, c, 1, 1), ("branch7x7_2", c, c, 1, 7),
                                     ("branch7x7_3", c, 192, 7, 1), ("branch7x7dbl_1", 768, c, 1, 1), ("branch7x7dbl_2", c, c, 7, 1),
                                     ("branch7x7dbl_3", c, c, 1, 7), ("branch7x7dbl_4", c, c, 7, 1), ("branch7x7dbl_5", c, 192, 1, 7),
                                     ("branch_pool", 768, 192, 1, 1)):
            yield f"{name}.{branch}", i, o, kh, kw
    for branch, i, o, kh, kw in (("branch3x3_1", 768, 192, 1, 1), ("branch3x3_2", 192, 320, 3, 3), ("branch7x7x3_1", 768, 192, 1, 1),
                                 ("branch7x7x3_2", 192, 192, 1, 7), ("branch7x7x3_3", 192, 192, 7, 1), ("branch7x7x3_4", 192, 192, 3, 3)):
        yield f"Mixed_7a.{branch}", i, o, kh, kw
    for name, n in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        for branch, i, o, kh, kw in (("branch1x1", n, 320, 1, 1), ("branch3x3_1", n, 384, 1, 1), ("branch3x3_2a", 384, 384, 1, 3),
                                     ("branch3x3_2b", 384, 384, 3, 1), ("branch3x3dbl_1", n, 448, 1, 1), ("branch3x3dbl_2", 448, 384, 3, 3),
                                     ("branch3x3dbl_3a", 384, 384, 1, 3), ("branch3x3dbl_3b", 384, 384, 3, 1), ("branch_pool", n, 192, 1, 1)):
            yield f"{name}.{branch}", i, o, kh, kw


@pytest.fixture(scope="module")
def weights():
    """A state dict with the names and shapes of the public file, and random values that keep activations alive."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, i, o, kh, kw in convolutions():
        state[f"{name}.conv.weight"] = torch.randn(o, i, kh, kw, generator=generator) * (2 / (i * kh * kw)) ** 0.5
        for key, value in (("weight", 1.0), ("bias", 0.1), ("running_mean", 0.1), ("running_var", 1.0)):
            state[f"{name}.bn.{key}"] = torch.rand(o, generator=generator) * 0.2 + value
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"], state["fc.bias"] = torch.randn(1008, 2048, generator=generator), torch.zeros(1008)
    return state


def reference(state, x):
    """The network again, functionally and from the weights' names alone."""
    def conv(name, x, **options):
        x = F.conv2d(x, state[f"{name}.conv.weight"], **options)
        mean, var, w, b = (state[f"{name}.bn.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias"))
        return ((x - mean) / (var + 1e-3).sqrt() * w + b).clamp(min=0)

    def same(name, x, **options):                                           # padding that keeps the size
        return conv(name, x, padding="same", **options)

    def average(x):                                                         # the sum over the window by the number of real pixels in it
        ones = torch.ones(1, 1, 3, 3).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(x, ones, padding=1, groups=x.shape[1]) / F.conv2d(torch.ones_like(x), ones, padding=1, groups=x.shape[1])

    def largest(x):                                                         # max over the window, padding out of the game
        windows = F.pad(x, (1, 1, 1, 1), value=-1e9).unfold(2, 3, 1).unfold(3, 3, 1)
        return windows.amax(dim=(-1, -2))

    x = conv("Conv2d_1a_3x3", x, stride=2)
    x = same("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x))
    x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", F.max_pool2d(x, 3, 2)))
    x = F.max_pool2d(x, 3, 2)
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        double = same(f"{m}.branch3x3dbl_3", same(f"{m}.branch3x3dbl_2", same(f"{m}.branch3x3dbl_1", x)))
        x = torch.cat([same(f"{m}.branch1x1", x), same(f"{m}.branch5x5_2", same(f"{m}.branch5x5_1", x)), double,
                       same(f"{m}.branch_pool", average(x))], 1)
    m = "Mixed_6a"
    double = conv(f"{m}.branch3x3dbl_3", same(f"{m}.branch3x3dbl_2", same(f"{m}.branch3x3dbl_1", x)), stride=2)
    x = torch.cat([conv(f"{m}.branch3x3", x, stride=2), double, F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        single, double = x, x
        for i in range(1, 4):
            single = same(f"{m}.branch7x7_{i}", single)
        for i in range(1, 6):
            double = same(f"{m}.branch7x7dbl_{i}", double)
        x = torch.cat([same(f"{m}.branch1x1", x), single, double, same(f"{m}.branch_pool", average(x))], 1)
    m, single = "Mixed_7a", x
    for i in range(1, 4):
        single = same(f"{m}.branch7x7x3_{i}", single)
    x = torch.cat([conv(f"{m}.branch3x3_2", same(f"{m}.branch3x3_1", x), stride=2), conv(f"{m}.branch7x7x3_4", single, stride=2),
                   F.max_pool2d(x, 3, 2)], 1)
    for m, pool in (("Mixed_7b", average), ("Mixed_7c", largest)):
        single, double = same(f"{m}.branch3x3_1", x), same(f"{m}.branch3x3dbl_2", same(f"{m}.branch3x3dbl_1", x))
        x = torch.cat([same(f"{m}.branch1x1", x), *(same(f"{m}.branch3x3_2{c}", single) for c in "ab"),
                       *(same(f"{m}.branch3x3dbl_3{c}", double) for c in "ab"), same(f"{m}.branch_pool", pool(x))], 1)
    return x.flatten(2).mean(2)


def test_network_takes_the_public_names_and_agrees_with_a_second_writing_of_it(weights):
    network = Inception().eval()
    assert {name: tuple(w.shape) for name, w in network.state_dict().items()} == {name: tuple(w.shape) for name, w in weights.items()}
    network.load_state_dict(weights, strict=True)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = network(images), reference(weights, (resize(images.float(), 299) - 128) / 128)
    assert ours.shape == (2, 2048) and ours.std() > 0.01 and (ours[0] - ours[1]).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_weights_are_checked_against_the_hash_in_their_name(weights, tmp_path):
    path = tmp_path / "plain.pth"
    torch.save(weights, path)
    assert torch.equal(load_inception(path).fc.weight, weights["fc.weight"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert load_inception(path.rename(tmp_path / f"right-{digest}.pth"))
    wrong = tmp_path / "wrong-01234567.pth"
    (tmp_path / f"right-{digest}.pth").rename(wrong)
    with pytest.raises(ValueError, match=f"wrong-01234567.pth: damaged, its hash begins with {digest}"):
        load_inception(wrong)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="plain.pth: not the weights"):
        load_inception(path)


# ---- the command ----

def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, words)])
    try:
        fid.main()
        code = 0
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out.strip(), captured.err


@pytest.fixture
def images(tmp_path):
    """The same 40 grey images as a folder with sub-folders and as an npz."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / "folder" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "folder" / str(i % 3) / f"{i}.png")
    np.savez(tmp_path / "samples.npz", arr_0=pixels[..., None])
    return tmp_path, pixels


def test_sources_of_the_same_images_are_at_no_distance(images, monkeypatch, capsys):
    folder, pixels = images
    code, out, err = command(monkeypatch, capsys, "stats", folder / "samples.npz", "-o", folder / "stats.npz", "--features=pixels", "--batch=7")
    assert code == 0 and out == str(folder / "stats.npz")
    flat = pixels.reshape(40, -1) / 127.5 - 1
    with np.load(folder / "stats.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(file["mu"], flat.mean(0), atol=1e-6)
        np.testing.assert_allclose(file["sigma"], np.cov(flat.T), atol=1e-6)
        assert file["count"] == 40
    for a, b in (("folder", "samples.npz"), ("stats.npz", "samples.npz"), ("stats.npz", "folder")):
        code, out, err = command(monkeypatch, capsys, folder / a, folder / b, "--features=pixels")
        assert code == 0 and abs(float(out)) < 1e-9 and "40 images are few for 16 features" in err
    np.savez(folder / "other.npz", mu=flat.mean(0) + 2, sigma=np.cov(flat.T))                # no count: pytorch-fid's files
    code, out, err = command(monkeypatch, capsys, folder / "other.npz", folder / "samples.npz", "--features=pixels")
    assert float(out) == pytest.approx(16 * 4, rel=1e-6)


def test_a_torchscript_file_gives_the_features(images, monkeypatch, capsys):
    folder, pixels = images

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.float().mean(dim=(2, 3))

    torch.jit.script(Mean()).save(folder / "mean.pt")
    code, out, err = command(monkeypatch, capsys, "stats", folder / "folder", "-o", folder / "stats.npz", f"--features={folder / 'mean.pt'}")
    with np.load(folder / "stats.npz") as file:                             # grey became RGB
        np.testing.assert_allclose(file["mu"], [pixels.mean()] * 3, rtol=1e-6)


def test_bad_input_is_one_line_that_names_it(images, monkeypatch, capsys):
    folder, pixels = images

    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.float().mean()

    class Infinite(torch.nn.Module):
        def forward(self, x):
            return x.float().flatten(1) / 0

    for module, name in ((Flat(), "flat.pt"), (Infinite(), "infinite.pt")):
        torch.jit.script(module).save(folder / name)
    (folder / "empty").mkdir(), (folder / "corrupt").mkdir()
    (folder / "corrupt" / "a.png").write_bytes((folder / "folder" / "0" / "0.png").read_bytes()[:40])
    (folder / "text.npz").write_text("hello")
    (folder / "weights-01234567.pth").write_bytes(b"no")
    np.savez(folder / "nothing.npz", x=np.zeros(3))
    np.savez(folder / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    np.savez(folder / "floats.npz", arr_0=np.zeros((3, 4, 4, 3)))
    np.savez(folder / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(folder / "odd.npz", mu=np.zeros(3), sigma=np.eye(4))
    good = folder / "samples.npz"
    for words, message in (
            ((folder / "corrupt", good, "--features=pixels"), "a.png: does not decode"),
            ((folder / "empty", good, "--features=pixels"), "empty: there are no images"),
            ((folder / "nothing.npz", good, "--features=pixels"), "nothing.npz: has neither mu and sigma nor arr_0, but x"),
            ((folder / "text.npz", good, "--features=pixels"), "text.npz: "),
            ((folder / "pickled.npz", good, "--features=pixels"), "pickled.npz: "),
            ((folder / "floats.npz", good, "--features=pixels"), "floats.npz: arr_0 must be uint8"),
            ((folder / "small.npz", good, "--features=pixels"), "small.npz has 3 features, "),
            ((folder / "odd.npz", folder / "odd.npz", "--features=pixels"), "odd.npz: mu (3,) and sigma (4, 4) are not finite (D,) and (D, D)"),
            ((good, good, f"--weights={folder / 'weights-01234567.pth'}"), "weights-01234567.pth: damaged"),
            ((good, good, f"--weights={folder / 'none.pth'}"), "none.pth: No such file"),
            ((good, good, f"--features={folder / 'flat.pt'}"), "flat.pt: must map 40 images to (40, D), not to ()"),
            ((good, good, f"--features={folder / 'infinite.pt'}"), "samples.npz: has features that are not finite"),
            ((good, good, f"--features={folder / 'text.npz'}"), "text.npz: no TorchScript module"),
            (("nowhere", good, "--features=pixels"), "there is no 'nowhere'"),
            (("sweep", folder / "folder", "--std", "0.1", "--features=pixels"), "folder: has no config.toml"),
            (("sweep", folder / "folder", "--std", "0.9", "--features=pixels"), "an EMA width must lie"),
            ((good, good, "--count=0"), "--count: must be at least 1"),
            (("stats", good, "--features=pixels", f"--out={folder}/no/where.npz"), "--out: there is no directory")):
        code, out, err = command(monkeypatch, capsys, *words)
        line = err.strip().splitlines()[-1]
        assert code == 2 and line.startswith("fid.py: error: ") and message in line, (words, err)
        assert "Traceback" not in err
    code, out, err = command(monkeypatch, capsys, folder / "folder", "nowhere", "--features=pixels")
    assert code == 2 and "there is no 'nowhere'" in err and "40 images" not in err           # before any work on the first
