"""Fréchet distance between two sets of images: `python fid.py out/digits digits --features=pixels`.

Each image becomes a feature vector; both sets of vectors are summed up as a Gaussian, and the distance is that between the
Gaussians. With the 2048 features of the Inception network of 2015 it is the FID [Heusel et al. 2017, arXiv 1706.08500]. Lower
is better, and only distances with the same features, the same reference and the same number of images compare.

    python fid.py A B                             # compare any two sources
    python fid.py stats A -o FILE.npz             # save the Gaussian of one (mu and sigma, as other FID tools do)
    python fid.py sweep RUN --std 0.03 0.05 0.1   # distance of a run to its dataset, against the EMA width

A source is a folder of images, an npz of samples (arr_0) or of statistics (mu, sigma), a dataset that data.py knows, or a run
directory, from which samples are drawn on the fly. Under torchrun the processes share the images.
"""

import argparse
import hashlib
import math
import os
import pickle
import re
import sys
import time
import tomllib
import zlib
from pathlib import Path
from urllib.error import URLError
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

from data import NAMES, decode_picture, list_pictures, load_dataset, open_picture
from ema import atomic_file, snapshot_path, std_to_gamma
from sample import (check_guidance, choose_device, guided, join_processes, leave_processes, load_decoder, load_denoiser, sample, save_picture,
                    use_threads)

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


# ---- the distance ----

class FeatureStatistics:
    """Mean and covariance of feature vectors, in one pass and in float64.

    Keeps the mean and the scatter matrix around it, and joins those of two sets exactly [Chan et al. 1979], so that large
    means do not drown small variances and the order or split of the data does not matter.
    """

    def __init__(self, count=0, mean=None, scatter=None):
        self.count, self.mean, self.scatter = count, mean, scatter

    def update(self, features):
        """Add feature vectors (N, D)."""
        features = features.cpu() if features.device.type == "mps" else features            # it has no float64
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        self.merge(FeatureStatistics(len(features), mean, centred.T @ centred))

    def merge(self, other):
        """Add all that another one has seen."""
        if self.count == 0:
            self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
        elif other.count:
            total, apart = self.count + other.count, other.mean - self.mean
            self.scatter += other.scatter
            self.scatter.addr_(apart, apart, alpha=self.count * other.count / total)
            self.mean += apart * (other.count / total)
            self.count = total

    def finish(self):
        """mu (D,), sigma (D, D), the unbiased covariance, as numpy arrays, and the count."""
        return self.mean.cpu().numpy(), (self.scatter / max(self.count - 1, 1)).cpu().numpy(), self.count


def clean_eigenvalues(values):
    """Eigenvalues of a positive semidefinite matrix without the rounding noise around 0, whose root would be large."""
    return np.where(values > len(values) * np.finfo(float).eps * values.max(), values, 0)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """‖mu1 - mu2‖² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½), squared 2-Wasserstein distance of two Gaussians.

    The trace of the root is the sum of the roots of the eigenvalues of sigma1^½ sigma2 sigma1^½, a symmetric matrix: no
    matrix square root of a nonsymmetric product, no complex numbers, and singular covariances are no special case.
    """
    if np.array_equal(mu1, mu2) and np.array_equal(sigma1, sigma2):
        return 0.0                                                          # without the rounding
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(clean_eigenvalues(values)) @ vectors.T
    product = root @ sigma2 @ root
    trace = np.sqrt(clean_eigenvalues(np.linalg.eigvalsh((product + product.T) / 2))).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


# ---- the Inception network of 2015-12-05, names as in the public weights file ----

class Conv(nn.Module):
    """Convolution without bias, batch normalization, ReLU."""

    def __init__(self, fan_in, fan_out, kernel, **options):
        super().__init__()
        self.conv = nn.Conv2d(fan_in, fan_out, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(fan_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def average_pool(x):
    """3×3, stride 1; padding does not count in the average, unlike in the common Inception-v3."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """35×35."""

    def __init__(self, fan_in, pool):
        super().__init__()
        self.branch1x1 = Conv(fan_in, 64, 1)
        self.branch5x5_1 = Conv(fan_in, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(fan_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(fan_in, pool, 1)

    def forward(self, x):
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          self.branch_pool(average_pool(x))], dim=1)


class InceptionB(nn.Module):
    """35×35 to 17×17."""

    def __init__(self, fan_in):
        super().__init__()
        self.branch3x3 = Conv(fan_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(fan_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x):
        return torch.cat([self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionC(nn.Module):
    """17×17, with 7×7 convolutions split into rows and columns."""

    def __init__(self, fan_in, inner):
        super().__init__()
        row, column = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = Conv(fan_in, 192, 1)
        self.branch7x7_1 = Conv(fan_in, inner, 1)
        self.branch7x7_2 = Conv(inner, inner, **row)
        self.branch7x7_3 = Conv(inner, 192, **column)
        self.branch7x7dbl_1 = Conv(fan_in, inner, 1)
        self.branch7x7dbl_2 = Conv(inner, inner, **column)
        self.branch7x7dbl_3 = Conv(inner, inner, **row)
        self.branch7x7dbl_4 = Conv(inner, inner, **column)
        self.branch7x7dbl_5 = Conv(inner, 192, **row)
        self.branch_pool = Conv(fan_in, 192, 1)

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                          self.branch7x7dbl_5(self.branch7x7dbl_4(double)), self.branch_pool(average_pool(x))], dim=1)


class InceptionD(nn.Module):
    """17×17 to 8×8."""

    def __init__(self, fan_in):
        super().__init__()
        self.branch3x3_1 = Conv(fan_in, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(fan_in, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x):
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)),
                          self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
                          F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionE(nn.Module):
    """8×8. pool: average_pool, or in the last block a max pool, as the network of 2015 has it."""

    def __init__(self, fan_in, pool):
        super().__init__()
        row, column = dict(kernel=(1, 3), padding=(0, 1)), dict(kernel=(3, 1), padding=(1, 0))
        self.branch1x1 = Conv(fan_in, 320, 1)
        self.branch3x3_1 = Conv(fan_in, 384, 1)
        self.branch3x3_2a = Conv(384, 384, **row)
        self.branch3x3_2b = Conv(384, 384, **column)
        self.branch3x3dbl_1 = Conv(fan_in, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, **row)
        self.branch3x3dbl_3b = Conv(384, 384, **column)
        self.branch_pool = Conv(fan_in, 192, 1)
        self.pool = pool

    def forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))], dim=1)


def resize(x, size):
    """Bilinear resize (B, C, H, W) -> (B, C, size, size) as TensorFlow 1 had it: pixel i of n comes from i·N/n, corners at 0."""
    for dim in (3, 2):
        length = x.shape[dim]
        source = torch.arange(size, dtype=torch.float64, device="cpu") * (length / size)
        low = source.floor().long()
        share = (source - low).to(x.dtype).to(x.device)
        low = low.to(x.device)
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
        x = torch.lerp(a, b, share if dim == 3 else share[:, None])
    return x


class Inception(nn.Module):
    """Images uint8 RGB (B, 3, H, W) -> the 2048 pooled features of FID (B, 2048). `fc`, its classifier, is only carried along."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pool=32)
        self.Mixed_5c = InceptionA(256, pool=64)
        self.Mixed_5d = InceptionA(288, pool=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, inner=128)
        self.Mixed_6c = InceptionC(768, inner=160)
        self.Mixed_6d = InceptionC(768, inner=160)
        self.Mixed_6e = InceptionC(768, inner=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average_pool)
        self.Mixed_7c = InceptionE(2048, nn.MaxPool2d(3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = (resize(x.float(), 299) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))                   # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))            # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)                                                    # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                                  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))    # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                                  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))


def load_inception(path=None):
    """The network with the public weights, from `path` or downloaded once into torch's cache. Raises ValueError, in one line."""
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL, str(path), hash_prefix=URL[-12:-4])
            except (OSError, RuntimeError) as error:                        # RuntimeError: wrong hash
                reason = error.reason if isinstance(error, URLError) else error
                raise ValueError(f"cannot download {URL} ({reason}); put the file at {path}, or name it with --weights") from None
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        expected = re.search(r"-([0-9a-f]{8})\.pth$", str(path))
        if expected and not digest.startswith(expected[1]):
            raise ValueError(f"{path}: damaged, its hash begins with {digest[:8]}; delete it to download it again")
        network = Inception()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (RuntimeError, TypeError, AttributeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not the weights of FID's Inception network ({type(error).__name__})") from None
    return network.eval()


# ---- features ----

def pixels(images):
    """The pixels themselves, scaled to -1..1: (B, C, H, W) uint8 -> (B, C·H·W). For tiny images."""
    return images.flatten(1).float() / 127.5 - 1


def load_features(name, weights, device):
    """A function from uint8 images (B, C, H, W) to features (B, D): `inception`, `pixels`, or a TorchScript file, which is
    given RGB. Raises ValueError, in one line, for a file that is none."""
    if name == "pixels":
        return pixels
    if name == "inception":
        network = load_inception(weights)
    else:
        try:
            network = torch.jit.load(name, map_location=device)
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"--features: {name}: no TorchScript module ({str(error).strip().splitlines()[0]})") from None
    network = network.to(device)

    def features(images):
        rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        try:
            result = network(rgb)
        except RuntimeError as error:
            raise ValueError(f"--features: {name}: fails on images {tuple(rgb.shape)} ({str(error).strip().splitlines()[-1]})") from None
        if not torch.is_tensor(result) or result.ndim != 2 or len(result) != len(rgb):
            shape = tuple(result.shape) if torch.is_tensor(result) else type(result).__name__
            raise ValueError(f"--features: {name}: must map {len(rgb)} images to ({len(rgb)}, D), not to {shape}")
        return result

    return features


# ---- sources ----

def read_images(paths, batch):
    """Yield the images in these files, in batches of one size each."""
    waiting = []
    for path in paths:
        with open_picture(path, path) as picture:
            image = torch.from_numpy(decode_picture(picture, path))
        if waiting and (len(waiting) == batch or image.shape != waiting[0].shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting)


def read_samples(path):
    """The images of an npz, arr_0 uint8 (N, H, W, C) or (N, H, W), as (N, C, H, W)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0"]
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: arr_0 cannot be read ({error})") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise ValueError(f"{path}: arr_0 must be uint8 (N, H, W, 1 or 3), not {images.dtype} {images.shape}")
    return torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)


def draw_samples(run, args, device, numbers):
    """Yield samples of a run; number i comes from seed args.seed + i and is of class i modulo the number of classes."""
    use_threads(run)
    denoiser, stats = load_denoiser(run, device, args.ema)
    decode = load_decoder(stats, device)
    classes = max(denoiser.net.config.num_classes, 1)
    check_guidance(denoiser, stats, args.guidance)
    for images in sample(denoiser, stats, [i % classes for i in numbers], [args.seed + i for i in numbers], args.batch,
                         denoise=guided(denoiser, args.guidance)):
        yield decode(images)


def read_statistics(path):
    """mu, sigma and the count of images (None if unknown) of an npz of statistics, or None for another npz."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if {"mu", "sigma"} <= set(file.files):
                mu, sigma = file["mu"].astype(float), file["sigma"].astype(float)
                if sigma.shape != 2 * mu.shape or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                    raise ValueError(f"mu {mu.shape} and sigma {sigma.shape} are not finite (D,) and (D, D)")
                return mu, sigma, int(file["count"]) if "count" in file.files else None
            if "arr_0" not in file.files:
                raise ValueError(f"has neither mu and sigma nor arr_0, but {', '.join(file.files) or 'nothing'}")
    except (OSError, ValueError, TypeError, EOFError, AttributeError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0] if str(error) else 'no npz'}") from None


def open_source(source, args, device, rank, processes):
    """How many images a source has, and this process's share of them in batches. source: a text or a Dataset."""
    path, share = Path(str(source)), slice(rank, None, processes)
    if isinstance(source, str) and source not in NAMES:
        if (path / "ema").is_dir():
            return args.count, draw_samples(path, args, device, range(args.count)[share])
        if path.is_dir():
            paths = list_pictures(path)
            if not paths:
                raise ValueError(f"{path}: there are no images in it, nor a run")
            return len(paths), read_images(paths[share], args.batch)
        if path.suffix == ".npz" and path.is_file():
            images = read_samples(path)
            return len(images), images[share].split(args.batch)
    dataset = load_dataset(source) if isinstance(source, str) else source
    if dataset.latent:
        raise ValueError("the dataset holds latents; name images to compare with")
    feed = dataset.feed(torch.arange(len(dataset))[share].split(args.batch), torch.device("cpu"))
    return len(dataset), (images for images, _ in feed)


@torch.no_grad()
def statistics(name, features, args, device, rank, processes, dataset=None):
    """mu, sigma and count (None if unknown) of a source, the same in every process. Raises ValueError naming it."""
    source = name
    if dataset is None and Path(source).suffix == ".npz" and Path(source).is_file():
        known = read_statistics(source)
        if known:
            return known
    total, batches = open_source(dataset or source, args, device, rank, processes)
    seen, begin = FeatureStatistics(), time.monotonic()
    shown = begin
    for images in batches:
        values = features(images.to(device))
        if not values.isfinite().all():
            raise ValueError(f"{source}: has features that are not finite")
        if seen.count and values.shape[1] != len(seen.mean):
            raise ValueError(f"{source}: images of different size have {len(seen.mean)} and {values.shape[1]} features")
        seen.update(values)
        now = time.monotonic()
        if rank == 0 and now - shown > (0.2 if sys.stderr.isatty() else 10):
            done, shown = seen.count * processes, now
            print(f"{source}: {done}/{total} images  {done / (now - begin):.0f} images/s  {(now - begin) * (total - done) / done:.0f} s left",
                  end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    if processes > 1:
        sizes = [torch.zeros((), dtype=torch.long) for _ in range(processes)]
        dist.all_gather(sizes, torch.tensor(len(seen.mean) if seen.count else 0))
        if not all(sizes):
            raise ValueError(f"{source}: has fewer images than there are processes")
        if len({int(size) for size in sizes}) > 1:
            raise ValueError(f"{source}: images of different size have different numbers of features")
        seen = merge_processes(seen, processes)
    if rank == 0:
        print(f"{source}: {seen.count} images, {len(seen.mean)} features", file=sys.stderr)
    return seen.finish()


def merge_processes(seen, processes):
    """The statistics of all processes together, joined in the same order everywhere."""
    mean, scatter = seen.mean.cpu(), seen.scatter.cpu()
    counts = [torch.zeros((), dtype=torch.long) for _ in range(processes)]
    means, scatters = [torch.empty_like(mean) for _ in counts], [torch.empty_like(scatter) for _ in counts]
    for received, own in ((counts, torch.tensor(seen.count)), (means, mean), (scatters, scatter)):
        dist.all_gather(received, own)
    joined = FeatureStatistics()
    for count, mean, scatter in zip(counts, means, scatters):
        joined.merge(FeatureStatistics(count.item(), mean, scatter))
    return joined


# ---- commands ----

def compare(a, b, names):
    """The Fréchet distance of two sources' statistics, with a warning if there are too few images for it to mean much."""
    (mu1, sigma1, count1), (mu2, sigma2, count2) = a, b
    if mu1.shape != mu2.shape:
        raise ValueError(f"{names[0]} has {mu1.size} features, {names[1]} has {mu2.size}: made with other features or image sizes")
    for count, name in ((count1, names[0]), (count2, names[1])):
        if count is not None and count < 5 * len(mu1):
            print(f"warning: {name}: {count} images are few for {len(mu1)} features; the distance comes out too large, "
                  f"compare it only with others from {count} images", file=sys.stderr)
    return frechet_distance(mu1, sigma1, mu2, sigma2)


def save_statistics(statistics, path):
    """Write mu, sigma and count as an npz."""
    mu, sigma, count = statistics
    with atomic_file(path) as file:
        np.savez(file, mu=mu, sigma=sigma, **({} if count is None else {"count": count}))


def dataset_of(run):
    """Name of the dataset that a run directory was trained on, and the dataset, cropped and resized as it was there."""
    try:
        config = tomllib.loads((Path(run) / "config.toml").read_text(encoding="utf-8"))
        name, model = config["dataset"], config["model"]
        return name, load_dataset(name, model["image_size"], model["channels"])
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError):
        raise ValueError(f"{run}: has no config.toml that names its dataset; name one with --reference") from None


COLOURS = ("#1f5fa8", "#c2410c", "#15803d", "#7e22ce")


def save_plot(xs, curves, labels, path):
    """Draw curves over xs as lines with their points, as a PNG. curves: up to four {name: ys}, their names in a corner; a
    single one has its values at its points. labels: of the two axes."""
    width, height, margin = 480, 320, 56
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    lowest, highest = (choice(0, *(choice(ys) for ys in curves.values())) for choice in (min, max))

    def at(x, y):
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        up = (y - lowest) / ((highest - lowest) * 1.1 or 1)
        return margin + across * (width - 2 * margin), height - margin - up * (height - 2 * margin)

    bottom = height - margin
    draw.line([(margin, margin), (margin, bottom), (width - margin, bottom)], fill="black")
    for x in xs:
        draw.text((at(x, lowest)[0], bottom + 8), f"{x:g}", fill="black", anchor="mt")
    for y in (lowest, highest) if len(curves) > 1 else ():
        draw.text((margin - 6, at(0, y)[1]), f"{y:.2g}", fill="black", anchor="rm")
    for number, (colour, (name, ys)) in enumerate(zip(COLOURS, curves.items())):
        points = [at(x, y) for x, y in zip(xs, ys)]
        draw.line(points, fill=colour, width=2)
        for (px, py), y in zip(points, ys):
            draw.ellipse([px - 3, py - 3, px + 3, py + 3], fill=colour)
            if len(curves) == 1:
                draw.text((px, py - 8), f"{y:.3g}", fill=colour, anchor="mb")
        draw.text((margin + 12, margin + 16 * number), name, fill=colour, anchor="lm")
    draw.text((width / 2, height - 16), labels[0], fill="black", anchor="mm")
    draw.text((margin, margin - 16), labels[1], fill="black", anchor="lm")
    save_picture(torch.from_numpy(np.array(picture)).permute(2, 0, 1), path)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--features", default="inception", help="inception, pixels, or a TorchScript file that maps uint8 RGB "
                                                                "(N, 3, H, W) to (N, D) (default: inception)")
    common.add_argument("--weights", help="file of Inception weights (default: downloaded once)")
    common.add_argument("--count", type=int, default=50000, help="samples to draw from a run (default: 50000)")
    common.add_argument("--seed", type=int, default=0, help="seed of the first of them (default: 0)")
    common.add_argument("--ema", type=float, metavar="STD", help="EMA width to draw them with (default: the widest in training)")
    common.add_argument("--guidance", type=float, default=1.0, help="guidance to draw them with (default: 1, none)")
    common.add_argument("--batch", type=int, default=128, help="images at once (default: 128)")
    common.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    commands = parser.add_subparsers(dest="command", metavar="compare | stats | sweep")

    def command(name, help):
        return commands.add_parser(name, parents=[common], help=help, usage=argparse.SUPPRESS, description=help)

    two = command("compare", "distance of two sources (what fid.py A B does)")
    two.add_argument("a", help="a source")
    two.add_argument("b", help="a source")
    one = command("stats", "save the statistics of a source")
    one.add_argument("a", help="a source")
    one.add_argument("-o", "--out", type=Path, required=True, help="the npz to write")
    many = command("sweep", "distance of a run to its dataset for several EMA widths")
    many.add_argument("a", help="a run directory")
    many.add_argument("--std", type=float, nargs="+", required=True, help="EMA widths")
    many.add_argument("--reference", help="what to compare with (default: the dataset of the run)")
    many.add_argument("-o", "--out", type=Path, help="the plot to write (default: sweep.png in the run directory)")
    return parser


def main():
    words = sys.argv[1:]
    if words and words[0] not in ("compare", "stats", "sweep", "-h", "--help"):
        words = ["compare", *words]                                         # fid.py A B
    parser = make_parser()
    args = parser.parse_args(words)
    if args.command is None:
        return parser.print_help()
    rank, processes = join_processes()
    torch.backends.cudnn.allow_tf32 = False                                 # a number to compare wants all its digits
    try:
        for name, least in dict(count=1, seed=0, batch=1, guidance=0).items():
            if not least <= getattr(args, name) < math.inf:
                raise ValueError(f"--{name}: must be at least {least}, not {getattr(args, name)}")
        if args.command == "sweep":
            args.out = args.out or Path(args.a) / "sweep.png"
            for std in args.std:
                snapshot_path("", 0, std)
                std_to_gamma(std)
        if args.command != "compare" and not args.out.parent.is_dir():      # now rather than after all the work
            raise ValueError(f"--out: there is no directory {args.out.parent}")
        device = choose_device(args.device, int(os.environ["LOCAL_RANK"]) if processes > 1 else None)
        if rank > 0:
            dist.barrier()                                                  # the first process may have to download
        features = load_features(args.features, args.weights, device)
        if processes > 1 and rank == 0:
            dist.barrier()

        def of(source, dataset=None):
            return statistics(source, features, args, device, rank, processes, dataset)

        if args.command == "compare":
            for source in (args.a, args.b):                                 # both, before the work on the first
                if Path(source).suffix == ".npz" and Path(source).is_file():
                    read_statistics(source)
                else:
                    open_source(source, args, device, rank, processes)
            print(f"{compare(of(args.a), of(args.b), (args.a, args.b)):.6g}")
        elif args.command == "stats":
            found = of(args.a)
            if rank == 0:
                save_statistics(found, args.out)
            print(args.out)
        else:
            reference, dataset = (args.reference, None) if args.reference else dataset_of(args.a)
            distances, expected = [], of(reference, dataset)
            for args.ema in args.std:
                distances.append(compare(of(args.a), expected, (args.a, reference)))
                print(f"EMA width {args.ema:.3f}  distance {distances[-1]:.6g}", flush=True)
            print(f"best: EMA width {args.std[np.argmin(distances)]:.3f}")
            if rank == 0:
                ranked = sorted(zip(args.std, distances))
                xs, ys = zip(*ranked)
                save_plot(xs, {"": ys}, ("EMA width", f"Frechet distance to {reference}, features: {args.features}"), args.out)
            print(args.out)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    leave_processes(processes)


if __name__ == "__main__":
    main()
