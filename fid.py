"""Fréchet distance between two sets of images: `python fid.py compare out/digits digits --features=pixels`.

Each image becomes a feature vector, a Gaussian is fitted to the vectors of each set, and the distance is that between
the two Gaussians. With the 2048 features of the Inception network of 2015 it is the FID [Heusel et al. 2017, arXiv
1706.08500]. Lower is better; only distances with the same features, reference and number of images compare.

    python fid.py compare A B                     # any two sources
    python fid.py stats A --out=FILE.npz          # save the Gaussian of one (mu and sigma, as other FID tools do)
    python fid.py sweep RUN --std 0.03 0.05 0.1   # distance of a run to its dataset, against the EMA width

A source is a set that data.py prepared, a folder, zip or npz of images as they are, an npz of statistics (mu, sigma),
or a run directory or snapshot, from which samples are drawn, in float32. Under torchrun processes share the work.
"""

import os
import tomllib
from collections import Counter
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import (Parser, UserError, crop_and_resize, download, find_set, load_dataset, number, open_source, progress,
                  reading, regular, run_main, say)
from ema import atomic_file, list_snapshots
from sample import (check_guidance, choose_device, deal_labels, guided, join_processes, leave_processes, load_decoder,
                    load_denoiser, sample, together)

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
LAYOUT = "61093f3898ff55ee"                                                 # hash of the names and shapes in that file


@torch.no_grad()
def statistics(name, source, features, batch, device, rank=0, processes=1):
    """Mean (D,), unbiased covariance (D, D) and count of the features of a source's images, the same in every process.
    source: see open_run(). features: a function from images to features (B, D).
    Why plain sums in float64, as EDM2 has them: Inception's features have means near 0.3, so the subtraction of the
    mean at the end loses nothing, and one pass is enough."""
    count, draw, _ = source
    total = products = 0
    with together(processes):
        if count < processes:
            raise UserError(f"{name}: has {count} images for {processes} processes")
        numbers = range(rank, count, processes)
        batches = [numbers[i:i + batch] for i in range(0, len(numbers), batch)]
        for part in progress(batches, f"{name}, images", len(numbers), len):
            x = features(draw(part).to(device))
            if x.shape[1] > 2**14:                                          # whose covariance would take 2 GB
                raise UserError(f"{name}: {x.shape[1]:,} features are too many; pixels are for tiny images")
            x = (x.cpu() if x.device.type == "mps" else x).double()         # mps has no float64
            total, products = total + x.sum(0), products + x.T @ x
    total, products = total.cpu(), products.cpu()
    if processes > 1:
        dist.all_reduce(total)
        dist.all_reduce(products)
    mean = total / count
    sigma = (products - count * torch.outer(mean, mean)) / max(count - 1, 1)
    return mean.numpy(), sigma.numpy(), count


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """‖mu1 - mu2‖² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½), squared 2-Wasserstein distance of two Gaussians.
    Why by eigenvalues of sigma1^½ sigma2 sigma1^½, a symmetric matrix: the trace of the root is the sum of their roots,
    there are no complex numbers, and singular covariances are no special case."""
    def clean(values):                                                      # rounding noise around 0 has large roots
        return np.where(values > len(values) * np.finfo(float).eps * values.max(), values, 0)

    if np.array_equal(mu1, mu2) and np.array_equal(sigma1, sigma2):
        return 0.0                                                          # without the rounding
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(clean(values)) @ vectors.T
    product = root @ sigma2 @ root
    trace = np.sqrt(clean(np.linalg.eigvalsh((product + product.T) / 2))).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)                                        # rounding may end below


def resize(x, size):
    """Bilinear resize (B, C, H, W) -> (B, C, size, size) as in TensorFlow 1: pixel i of n comes from i·N/n.
    Why with one row and column more: with the corners aligned, torch reads pixel i of n + 1 at i·N/n of N + 1."""
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(x, (size + 1, size + 1), mode="bilinear", align_corners=True)[..., :size, :size]


def inception(images, weights):
    """The network of 2015-12-05: images uint8 RGB (B, 3, H, W) -> the 2048 pooled features of FID (B, 2048).
    weights: those of fold_normalization(). Why no widths are written here: they are those of the kernels, and
    load_inception takes only kernels of the right shapes."""
    def conv(x, name, stride=None):                                         # with a stride, even 1, without padding
        return F.relu(F.conv2d(x, *weights[name], stride or 1, 0 if stride else "same"), inplace=True)

    def branch(x, block, *names):
        for name in names:
            x = conv(x, f"{block}.branch{name}")
        return x

    average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)    # not torchvision's
    maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
    x = (resize(images.float(), 299) - 128) / 128
    x = x.contiguous(memory_format=torch.channels_last)                     # which is faster on CPUs
    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3", 1), "Conv2d_2b_3x3")
    x = F.max_pool2d(x, 3, stride=2)                                        # (B, 64, 73, 73)
    x = conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", 1)
    x = F.max_pool2d(x, 3, stride=2)                                        # (B, 192, 35, 35)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat([branch(x, block, "1x1"), branch(x, block, "5x5_1", "5x5_2"),
                       branch(x, block, "3x3dbl_1", "3x3dbl_2", "3x3dbl_3"), branch(average(x), block, "_pool")], 1)
    double = branch(x, "Mixed_6a", "3x3dbl_1", "3x3dbl_2")
    x = torch.cat([conv(x, "Mixed_6a.branch3x3", 2), conv(double, "Mixed_6a.branch3x3dbl_3", 2),
                   F.max_pool2d(x, 3, stride=2)], 1)                        # (B, 768, 17, 17)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = torch.cat([branch(x, block, "1x1"), branch(x, block, "7x7_1", "7x7_2", "7x7_3"),
                       branch(x, block, "7x7dbl_1", "7x7dbl_2", "7x7dbl_3", "7x7dbl_4", "7x7dbl_5"),
                       branch(average(x), block, "_pool")], 1)
    single = branch(x, "Mixed_7a", "3x3_1")
    double = branch(x, "Mixed_7a", "7x7x3_1", "7x7x3_2", "7x7x3_3")
    x = torch.cat([conv(single, "Mixed_7a.branch3x3_2", 2), conv(double, "Mixed_7a.branch7x7x3_4", 2),
                   F.max_pool2d(x, 3, stride=2)], 1)                        # (B, 1280, 8, 8)
    for block, pool in (("Mixed_7b", average), ("Mixed_7c", maximum)):
        single = branch(x, block, "3x3_1")
        double = branch(x, block, "3x3dbl_1", "3x3dbl_2")
        x = torch.cat([branch(x, block, "1x1"), branch(single, block, "3x3_2a"), branch(single, block, "3x3_2b"),
                       branch(double, block, "3x3dbl_3a"), branch(double, block, "3x3dbl_3b"),
                       branch(pool(x), block, "_pool")], 1)
    return x.mean(dim=(2, 3))                                               # (B, 2048)


def fold_normalization(state):
    """Kernel and bias of each convolution of the weights file, by name, with its batch normalization folded in.
    Why: one pass over the pixels is faster than two. The kernels' memory format is the one that is fastest on CPUs."""
    weights = {}
    for name in [key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")]:
        gain = state[f"{name}.bn.weight"] / (state[f"{name}.bn.running_var"] + 0.001).sqrt()
        kernel = state[f"{name}.conv.weight"] * gain[:, None, None, None]
        bias = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * gain
        weights[name] = kernel.contiguous(memory_format=torch.channels_last), bias
    return weights


def load_inception(path=None, device="cpu"):
    """inception() with the public weights, from `path` or downloaded once into torch's cache. Raises UserError.
    Why the layout is compared: torchvision's Inception has the same convolutions, but is another network."""
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
        download(URL, path, "6726825d")
    with reading(path):
        state = torch.load(regular(path), map_location=device, weights_only=True)
        state = {name: value.float() for name, value in state.items() if not name.endswith(".num_batches_tracked")}
        layout = sorted((name, tuple(value.shape)) for name, value in state.items())
        if sha256(repr(layout).encode()).hexdigest()[:16] != LAYOUT:
            raise ValueError("has other names or shapes than the public weights file")
    return partial(inception, weights=fold_normalization(state))


def load_features(name, weights, device):
    """A function from uint8 images (B, C, H, W) to features (B, D): `inception`, `pixels` (for tiny images, scaled to
    -1..1), or a TorchScript file, which is given RGB. Raises UserError for a file that is no TorchScript. Why none of
    torch.export: to load one evaluates texts in it that stand for sizes, which can be any code (torch 2.13)."""
    if name == "pixels":
        return lambda images: images.flatten(1).float() / 127.5 - 1
    with reading(f"--features={name}"):
        if name == "inception":
            network = load_inception(weights, device)
        else:
            network = torch.jit.load(regular(name), map_location=device).eval()

    def features(images):
        with reading(f"--features={name}"):
            values = network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)
            if values.ndim != 2 or len(values) != len(images) or not values.isfinite().all():
                raise ValueError(f"must map {len(images)} images to finite features (N, D), not {tuple(values.shape)}")
            return values

    return features


def read_statistics(path):
    """mu, sigma and the count of images (None if unknown) of an npz of statistics, or None for any other source."""
    if Path(path).suffix != ".npz" or not Path(path).is_file():
        return None
    with reading(path), np.load(path, allow_pickle=False) as file:
        if not {"mu", "sigma"} <= set(file.files):
            return None
        mu, sigma = file["mu"].astype(float), file["sigma"].astype(float)
        if sigma.shape != 2 * mu.shape or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"mu {mu.shape} and sigma {sigma.shape} are not finite (D,) and (D, D)")
        return mu, sigma, int(file["count"]) if "count" in file.files else None


def open_run(run, args, device, std):
    """A run as a source, a triple: how many samples, a function from their numbers to uint8 images (B, C, H, W), and
    their shape (C, S, S), or None for decoded latents. None if `run` is no run directory, folder of snapshots or
    snapshot. Sample i comes from seed args.seed + i; classes are as frequent as in the data of the run."""
    if not ((Path(run) / "ema").is_dir() or list_snapshots(run) or Path(run).suffix == ".pt"):
        return None
    denoiser, facts = load_denoiser(run, device, std)
    decode, config = load_decoder(facts, device), denoiser.net.config
    check_guidance(config, facts, args.guidance)
    denoise = guided(denoiser, args.guidance)

    def draw(numbers):
        seeds = [args.seed + i for i in numbers]
        return decode(sample(denoiser, facts, deal_labels(facts["counts"], numbers), seeds, denoise=denoise))

    return args.count, draw, None if facts["latent"] else (config.channels, config.image_size, config.image_size)


def open_images(source, shape):
    """Any other images as a source, see open_run(). shape: what to make of them, by the preparation that data.py has
    for training, or None: they stay as they are, grey ones among colour in colour. Why: otherwise the distance would
    also measure that the two sides were cropped or resized differently."""
    ready, here = find_set(source), Path(source).exists()
    if ready and here and not ready.samefile(source):
        raise UserError(f"{source} is a path here and also a prepared set; write {os.path.abspath(source)} or {ready}")
    images = open_source(source, Counter()).images if here and not ready else load_dataset(source).images
    with reading(source):
        colour = shape is None and any(len(image) > 1 for image in images)
    form = f"{shape[1]}x{shape[2]}, {'grey' if shape[0] == 1 else 'colour'}, as the run's" if shape else "as they are"
    say(f"{source}: {len(images):,} images, {form}")

    def read(numbers):
        with reading(source):
            batch = [images[i] for i in numbers]
            if batch[0].dtype != np.uint8:
                raise ValueError("holds latents; name images to compare with")
            if shape:
                batch = [crop_and_resize(image, shape[1], shape[0], Counter()) for image in batch]
            elif colour:
                batch = [np.repeat(image, 3 // len(image), axis=0) for image in batch]
            if len({image.shape for image in batch}) > 1:
                raise ValueError("its images differ in size; python data.py with --size makes them alike")
            return torch.from_numpy(np.stack(batch))

    return len(images), read, shape


def compare(a, b, names):
    """The Fréchet distance of two sources' statistics, with a warning if there are few images for so many features."""
    (mu1, sigma1, _), (mu2, sigma2, _) = a, b
    if mu1.shape != mu2.shape:
        raise UserError(f"{names[0]} has {mu1.size} features, {names[1]} has {mu2.size}: other features or image sizes")
    for (mu, _, count), name in zip((a, b), names):
        if count is not None and count < 5 * len(mu):
            say(f"warning: {name}: {count} images are few for {len(mu)} features; the distance comes out too large, "
                f"compare it only with others from {count} images")
    return frechet_distance(mu1, sigma1, mu2, sigma2)


def dataset_of(run):
    """Name of the dataset that a run directory was trained on."""
    with reading(f"{run} is no run directory, or its config.toml is damaged"):
        return tomllib.loads(regular(Path(run) / "config.toml").read_text(encoding="utf-8"))["dataset"]


def make_parser():
    parser = Parser(__doc__)
    add, std = parser.add_argument, number(float, 0.001, 0.288)
    add("command", choices=["compare", "stats", "sweep"], help="what to do, see above")
    add("sources", nargs="+", help="two sources to compare, one for stats, a run directory to sweep")
    add("--features", default="inception", help="inception, pixels, or a TorchScript file that maps uint8 RGB "
                                                "(N, 3, H, W) to (N, D) (default: inception)")
    add("--weights", type=Path, help="file of Inception weights (default: downloaded once)")
    add("--count", type=number(int, 1, 10**8), default=50000, help="samples to draw from a run (default: 50000)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="seed of the first of them (default: 0)")
    add("--ema", type=std, metavar="STD", help="EMA width to draw them with (default: the widest in training)")
    add("--guidance", type=number(float, 0, 1e6), default=1.0, help="guidance to draw them with (default: 1, none)")
    add("--batch", type=number(int, 1, 65536), default=128, help="images at once (default: 128)")
    add("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    add("--out", type=Path, metavar="FILE.npz", help="stats: where they go")
    add("--std", type=std, nargs="+", help="sweep: EMA widths")
    add("--reference", help="sweep: what to compare with (default: the dataset of the run)")
    add("--plot", type=Path, metavar="FILE.svg", help="sweep: also draw the table")
    return parser


def main():
    rank, processes = join_processes()
    with together(processes):
        args = make_parser().parse_args()
        device, names, widths = choose_device(args.device), args.sources, [args.ema] * len(args.sources)
        for wrong, text in (
                (len(names) != (2 if args.command == "compare" else 1), "compare takes two sources, the others one"),
                (args.command == "stats" and Path(args.out or "").suffix != ".npz", "stats needs --out=FILE.npz"),
                (args.command == "sweep" and not args.std, "sweep needs --std"),
                (args.plot and args.plot.suffix != ".svg", f"--plot: {args.plot} is not the name of a .svg file")):
            if wrong:
                raise UserError(text)
        if args.command == "stats":
            args.out.parent.mkdir(parents=True, exist_ok=True)              # fails now rather than after the work
        if args.command == "sweep":                                         # of the run, to a reference
            names, widths = [args.reference or dataset_of(names[0]), *names], [args.ema, args.std[0]]
        features = load_features(args.features, args.weights, device)
        runs = [open_run(name, args, device, std) for name, std in zip(names, widths)]
        if args.command == "sweep" and not runs[-1]:
            raise UserError(f"{names[-1]} is no run directory to sweep")
        shape = next((run[2] for run in runs if run), None)
        known = [read_statistics(name) for name in names]
        sources = [run or found or open_images(name, shape) for name, run, found in zip(names, runs, known)]

    def measure(i):
        return known[i] or statistics(names[i], sources[i], features, args.batch, device, rank, processes)

    first = measure(0)
    if args.command == "stats":
        mu, sigma, count = first
        if rank == 0:
            with atomic_file(args.out) as file:
                np.savez(file, mu=mu, sigma=sigma, **({} if count is None else {"count": count}))
        print(args.out)
    elif args.command == "compare":
        print(f"{compare(first, measure(1), names):.6g}")
    else:
        points = []
        for i, std in enumerate(args.std):
            if i:                                                           # one at a time: two may not fit a GPU
                sources[1] = runs = None
                sources[1] = open_run(names[1], args, device, std)
            points.append((std, compare(measure(1), first, names[::-1])))
            print(f"EMA width {std:0<5}  distance {points[-1][1]:.6g}", flush=True)
        print(f"best: EMA width {min(points, key=lambda point: point[1])[0]:0<5}")
        if args.plot and rank == 0:
            from variants.plots import save_plot
            save_plot(args.plot, {f"to {names[0]}": sorted(points)}, "EMA width", f"Fréchet distance, {args.features}")
            print(args.plot)
    leave_processes(processes)


if __name__ == "__main__":
    run_main(main)
