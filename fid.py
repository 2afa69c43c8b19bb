"""Fréchet distance between two sets of images:
`python fid.py compare out/digits digits --features=pixels`.

Each image becomes a feature vector, a Gaussian is fitted to the vectors of each set, and the
distance is that between the two Gaussians. With the 2048 features of the Inception network of 2015
it is the FID. Lower is better; only compare distances computed with the same features, with the
same reference and from the same number of images.

    python fid.py compare A B                     # any two sources
    python fid.py stats A --out=FILE.npz          # save the Gaussian of one, mu and sigma, as other
                                                  # FID tools do
    python fid.py sweep RUN --std 0.03 0.05 0.1   # distance of a run to its dataset, by EMA width
                  --guidance 1 1.5 2              # and by guidance, always from the same seeds

A source is a set that data.py prepared, a folder, zip or npz of images (their central squares), an
npz of statistics (mu, sigma), or a run directory or snapshot, from which samples are drawn, in
float32. Under torchrun processes share the work.

Source: [FID] Heusel et al. 2017, arXiv 1706.08500. Read sample.py before.
"""

import importlib
import os
from collections import Counter, namedtuple
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import find_set, load_dataset
from plumbing.command import (Parser, UserError, between, existing_file, path_type, reading,
                              run_main, track, warn)
from plumbing.config import dataset_of
from plumbing.files import atomic_file, download
from plumbing.processes import (choose_device, join_processes, leave_processes, rank, together,
                                world_size)
from plumbing.snapshots import list_snapshots
from prepare.pictures import crop_and_resize
from prepare.sources import open_source
from sample import check_guidance, deal_labels, guided, load_decoder, load_denoiser, sample

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
LAYOUT = "61093f3898ff55ee"  # hash of the names and shapes in that file

# Mean (D,), unbiased covariance (D, D) and count of features, and which features these are; count
# and features are None if a file does not say
Statistics = namedtuple("Statistics", ["mu", "sigma", "count", "features"])

# of: a function from uint8 images (B, C, H, W) to features (B, D); name: says which they are
Features = namedtuple("Features", ["name", "of"])

# What statistics are taken of. draw: from a list of numbers, 0 to count - 1, to uint8 images
# (B, C, H, W); shape: (C, S, S) of the images, where it is known
Images = namedtuple("Images", ["count", "draw", "shape"])


@torch.no_grad()
def statistics(name, images, features, batch, device):
    """The Statistics of features of Images, the same in every process.

    features: a function from images to features (B, D), with their name.
    Why plain sums in float64, as EDM2 has them: Inception's features have means near 0.3, so the
    subtraction of the mean at the end loses nothing, and one pass is enough."""
    count = images.count
    total = products = 0
    with together():
        if count < world_size():
            raise UserError(f"{name}: has {count} images for {world_size()} processes")
        numbers = range(rank(), count, world_size())
        batches = [numbers[i:i + batch] for i in range(0, len(numbers), batch)]
        for part in track(batches, f"{name}, images", len(numbers), len):
            x = features.of(images.draw(part).to(device))
            if x.shape[1] > 2**14:  # whose covariance would take 2 GB
                raise UserError(f"{name}: {x.shape[1]:,} features are too many; "
                                "pixels are for tiny images")
            if x.device.type == "mps":  # which has no float64
                x = x.cpu()
            x = x.double()
            total = total + x.sum(0)
            products = products + x.T @ x
    total, products = total.cpu(), products.cpu()
    if world_size() > 1:
        dist.all_reduce(total)
        dist.all_reduce(products)
    mean = total / count
    sigma = (products - count * torch.outer(mean, mean)) / max(count - 1, 1)
    return Statistics(mean.numpy(), sigma.numpy(), count, features.name)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """‖mu1 - mu2‖² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½), the squared 2-Wasserstein distance
    of two Gaussians [FID].

    Why by eigenvalues: (sigma1 sigma2)^½ and (sigma1^½ sigma2 sigma1^½)^½ have the same trace, and
    the latter matrix is symmetric, so its trace is the sum of the roots of real eigenvalues. There
    are no complex numbers, and singular covariances are no special case."""
    def drop_rounding(values):  # a tiny eigenvalue that should be 0 has a large root
        return np.where(values > len(values) * np.finfo(float).eps * values.max(), values, 0)

    if np.array_equal(mu1, mu2) and np.array_equal(sigma1, sigma2):
        return 0.0  # without the rounding
    values, vectors = np.linalg.eigh(sigma1)
    root1 = vectors * np.sqrt(drop_rounding(values)) @ vectors.T  # sigma1^½
    product = root1 @ sigma2 @ root1
    values = np.linalg.eigvalsh((product + product.T) / 2)
    trace = np.sqrt(drop_rounding(values)).sum()  # tr (sigma1^½ sigma2 sigma1^½)^½
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)  # rounding may end below


def resize(x, size):
    """Bilinear resize (B, C, H, W) -> (B, C, size, size) as in TensorFlow 1: pixel i of n comes
    from i·N/n. Why with one row and column more: with the corners aligned, torch reads pixel i of n
    + 1 at i·N/n of N + 1."""
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, (size + 1, size + 1), mode="bilinear", align_corners=True)
    return x[..., :size, :size]


def inception(images, weights):
    """The network of 2015-12-05: images uint8 RGB (B, 3, H, W) -> the 2048 pooled features of FID
    (B, 2048). weights: those of fold_normalization(). Why no widths are written here: they are
    those of the kernels, and load_inception takes only kernels of the right shapes."""
    def conv(x, name, stride=1, pad=True):
        return F.relu(F.conv2d(x, *weights[name], stride, "same" if pad else 0), inplace=True)

    def branch(x, block, *names):
        for name in names:
            x = conv(x, f"{block}.branch{name}")
        return x

    def average(x):  # without the padding, unlike torchvision's
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def maximum(x):
        return F.max_pool2d(x, 3, stride=1, padding=1)

    x = (resize(images.float(), 299) - 128) / 128
    x = x.contiguous(memory_format=torch.channels_last)  # which is faster on CPUs
    x = conv(conv(x, "Conv2d_1a_3x3", stride=2, pad=False), "Conv2d_2a_3x3", pad=False)
    x = conv(x, "Conv2d_2b_3x3")
    x = F.max_pool2d(x, 3, stride=2)  # (B, 64, 73, 73)
    x = conv(x, "Conv2d_3b_1x1")
    x = conv(x, "Conv2d_4a_3x3", pad=False)
    x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat([
            branch(x, block, "1x1"),
            branch(x, block, "5x5_1", "5x5_2"),
            branch(x, block, "3x3dbl_1", "3x3dbl_2", "3x3dbl_3"),
            branch(average(x), block, "_pool")], dim=1)
    double = branch(x, "Mixed_6a", "3x3dbl_1", "3x3dbl_2")
    x = torch.cat([
        conv(x, "Mixed_6a.branch3x3", stride=2, pad=False),
        conv(double, "Mixed_6a.branch3x3dbl_3", stride=2, pad=False),
        F.max_pool2d(x, 3, stride=2)], dim=1)  # (B, 768, 17, 17)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = torch.cat([
            branch(x, block, "1x1"),
            branch(x, block, "7x7_1", "7x7_2", "7x7_3"),
            branch(x, block, "7x7dbl_1", "7x7dbl_2", "7x7dbl_3", "7x7dbl_4", "7x7dbl_5"),
            branch(average(x), block, "_pool")], dim=1)
    single = branch(x, "Mixed_7a", "3x3_1")
    double = branch(x, "Mixed_7a", "7x7x3_1", "7x7x3_2", "7x7x3_3")
    x = torch.cat([
        conv(single, "Mixed_7a.branch3x3_2", stride=2, pad=False),
        conv(double, "Mixed_7a.branch7x7x3_4", stride=2, pad=False),
        F.max_pool2d(x, 3, stride=2)], dim=1)  # (B, 1280, 8, 8)
    for block, pool in (("Mixed_7b", average), ("Mixed_7c", maximum)):
        single = branch(x, block, "3x3_1")
        double = branch(x, block, "3x3dbl_1", "3x3dbl_2")
        x = torch.cat([
            branch(x, block, "1x1"),
            branch(single, block, "3x3_2a"),
            branch(single, block, "3x3_2b"),
            branch(double, block, "3x3dbl_3a"),
            branch(double, block, "3x3dbl_3b"),
            branch(pool(x), block, "_pool")], dim=1)
    return x.mean(dim=(2, 3))  # (B, 2048)


def load_weights(path, device):
    """The state dict in a file. Raises UserError."""
    with reading(path, (ValueError, OSError)):
        existing_file(path)
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch's own text would advise to load it in an unsafe way
            raise ValueError("is damaged, or no file of weights") from error


def fold_normalization(state):
    """Kernel and bias of each convolution of the weights file, by name, with its batch
    normalization folded in. Why: one pass over the pixels is faster than two. The kernels' memory
    format is the one that is fastest on CPUs."""
    weights = {}
    for entry in state:
        if not entry.endswith(".conv.weight"):
            continue
        name = entry.removesuffix(".conv.weight")
        gain = state[f"{name}.bn.weight"] / (state[f"{name}.bn.running_var"] + 0.001).sqrt()
        kernel = state[entry] * gain[:, None, None, None]
        bias = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * gain
        weights[name] = kernel.contiguous(memory_format=torch.channels_last), bias
    return weights


def load_inception(path=None, device="cpu"):
    """inception() with the public weights, from `path` or downloaded once into torch's cache.
    Raises UserError. Why the layout is compared: torchvision's Inception has the same convolutions,
    but is another network."""
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
        download(URL, path, "6726825d")
    state = load_weights(path, device)
    with reading(path):
        state = {name: value.float() for name, value in state.items()
                 if not name.endswith(".num_batches_tracked")}
        layout = sorted((name, tuple(value.shape)) for name, value in state.items())
        if sha256(repr(layout).encode()).hexdigest()[:16] != LAYOUT:
            raise ValueError("has other names or shapes than the public weights file")
    return partial(inception, weights=fold_normalization(state))


def load_module_features(text, device):
    """The network of MODULE:FILE, in eval mode: class Features of the module, without arguments,
    with the state dict in the file. Raises UserError. Why no file that brings its code along:
    TorchScript is deprecated, and reading torch.export's files can run any code (torch 2.13)."""
    name, _, path = text.partition(":")
    if not name or not path:
        raise UserError(f"--features={text}: must be inception, pixels or MODULE:FILE")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # it misses something itself
            raise
        raise UserError(f"--features={text}: there is no module {name} on Python's path") from error
    if not hasattr(module, "Features"):
        raise UserError(f"--features={text}: {name} has no class Features")
    network = module.Features()
    state = load_weights(path, "cpu")
    with reading(path):
        state = {name: value.float() if value.is_floating_point() else value
                 for name, value in state.items()}
    with reading(path, RuntimeError):  # which says what does not fit
        network.load_state_dict(state)
    return network.to(device).eval()


def load_features(name, weights, device):
    """The Features called `inception`, `pixels` (for tiny images, scaled to -1..1), or MODULE:FILE,
    whose network gets RGB. Raises UserError."""
    if name == "pixels":
        return Features(name, lambda images: images.flatten(1).float() / 127.5 - 1)
    if name == "inception":
        network, full_name = load_inception(weights, device), name
    else:
        network = load_module_features(name, device)
        module, _, path = name.partition(":")
        full_name = f"{module}:{sha256(Path(path).read_bytes()).hexdigest()[:16]}"

    def features(images):
        with reading(f"--features={name}", ValueError):
            values = network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)
        if values.ndim != 2 or len(values) != len(images) or not values.isfinite().all():
            raise UserError(f"--features={name}: must map {len(images)} images to finite features "
                            f"(N, D), not {tuple(values.shape)}")
        return values

    return Features(full_name, features)


def read_statistics(path):
    """The Statistics in an npz of mu and sigma, or None for any other source. Raises UserError."""
    if Path(path).suffix != ".npz" or not Path(path).is_file():
        return None
    with reading(path), np.load(path, allow_pickle=False) as file:
        if not {"mu", "sigma"} <= set(file.files):
            return None
        mu, sigma = file["mu"].astype(float), file["sigma"].astype(float)
        if sigma.shape != 2 * mu.shape or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"mu {mu.shape}, sigma {sigma.shape} must be finite, (D,) and (D, D)")
        count = int(file["count"]) if "count" in file.files else None
        features = str(file["features"]) if "features" in file.files else None
        return Statistics(mu, sigma, count, features)


def save_statistics(path, found):
    """Write Statistics as an npz of mu, sigma and, if known, count and features."""
    arrays = {name: value for name, value in found._asdict().items() if value is not None}
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def open_run(run, args, device, std, guidance):
    """Samples of a run as Images, or None if `run` is no run directory, folder of snapshots or
    snapshot. Sample i comes from seed args.seed + i; classes are as frequent as in its data.
    Raises UserError unless all of args.guidance can be used."""
    if not ((Path(run) / "ema").is_dir() or list_snapshots(run) or Path(run).suffix == ".pt"):
        return None
    denoiser, facts = load_denoiser(run, device, std)
    config = denoiser.net.config
    decode = load_decoder(facts, config.channels, device)
    for strength in args.guidance:
        check_guidance(config, facts, strength)
    denoise = guided(denoiser, guidance)

    def draw(numbers):
        seeds = [args.seed + number for number in numbers]
        labels = deal_labels(facts["counts"], seeds)
        return decode(sample(denoiser, facts, labels, seeds, denoise=denoise))

    shape = (config.channels, config.image_size, config.image_size)
    return Images(args.count, draw, None if facts["latent"] else shape)


def open_images(source, shape):
    """Any other source as Images.

    shape: what to make of them, by the preparation that data.py has for training, or None: they
    keep their size, but are cropped to squares, and grey ones among colour become colour, as
    data.py does it. Why: otherwise the distance would also measure that the two sides were cropped
    or resized differently."""
    ready, here = find_set(source), Path(source).exists()
    if ready and here and not ready.samefile(source):
        raise UserError(f"{source} is a path here and also a prepared set; "
                        f"write {os.path.abspath(source)} or {ready}")
    if ready or not here:
        images = load_dataset(source).images
        places = range(len(images))
    else:
        found = open_source(source, Counter(), "none")
        held_out = np.zeros(len(found.images), bool) if found.held_out is None else found.held_out
        images, places = found.images, np.flatnonzero(~held_out).tolist()
    if shape:
        channels, side, _ = shape
        form = f"{side}x{side}, {'grey' if channels == 1 else 'colour'}, as the run's"
    else:
        colour = any(len(images[place]) > 1 for place in places)
        channels, side, form = 3 if colour else 1, None, "in their own size"
    part = "" if len(places) == len(images) else f", those to train on, of {len(images):,}"
    warn(f"{source}: {len(places):,} images{part}, {form}")

    def draw(numbers):
        batch = [images[places[number]] for number in numbers]
        if batch[0].dtype != np.uint8:
            raise UserError(f"{source}: holds latents; name images to compare with")
        batch = [crop_and_resize(image, side, channels, Counter()) for image in batch]
        if len({image.shape for image in batch}) > 1:
            raise UserError(f"{source}: its images differ in size; "
                            "python data.py with --size makes them alike")
        return torch.from_numpy(np.stack(batch))

    return Images(len(places), draw, shape)


def distance(a, b, names):
    """The Fréchet distance of two Statistics, with a warning if they come from few images for so
    many features. names: of their sources. Raises UserError if their features differ."""
    if a.features and b.features and a.features != b.features:
        raise UserError(f"{names[0]} has features {a.features}, {names[1]} has {b.features}")
    if a.mu.shape != b.mu.shape:
        raise UserError(f"{names[0]} has {a.mu.size} features, {names[1]} has {b.mu.size}: "
                        "other features or image sizes")
    for found, name in zip((a, b), names):
        count, size = found.count, len(found.mu)
        if count is not None and count < 5 * size:
            warn(f"warning: {name}: {count} images are few for {size} features; the distance "
                 f"comes out too large, compare it only with others from {count} images")
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


def make_parser():
    parser = Parser(__doc__)
    add, std = parser.add_argument, between(float, 0.001, 0.288)
    add("command", choices=["compare", "stats", "sweep"], help="what to do, see above")
    add("sources", nargs="+", type=os.path.expanduser,
        help="two sources to compare, one for stats, a run directory to sweep")
    add("--features", default="inception",
        help="inception, pixels, or MODULE:FILE, a module's class Features, uint8 RGB (N, 3, H, W) "
             "-> (N, D), and its state dict, like tools.classifier:out/features.pt "
             "(default: inception)")
    add("--weights", type=path_type, help="file of Inception weights (default: downloaded once)")
    add("--count", type=between(int, 1, 10**8), default=50000,
        help="samples to draw from a run (default: 50000)")
    add("--seed", type=between(int, 0, 2**31), default=0,
        help="seed of the first of them (default: 0)")
    add("--ema", type=std, metavar="STD",
        help="EMA width to draw them with (default: the widest in training)")
    add("--guidance", type=between(float, 0, 1e6), nargs="+", default=[1.0],
        help="guidance to draw them with, for a sweep one or several (default: 1, none)")
    add("--batch", type=between(int, 1, 65536), default=128, help="images at once (default: 128)")
    add("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    add("--out", type=path_type, metavar="FILE.npz", help="stats: where they go")
    add("--std", type=std, nargs="+", help="sweep: EMA widths")
    add("--reference", type=os.path.expanduser,
        help="sweep: what to compare with (default: the dataset of the run)")
    add("--plot", type=path_type, metavar="FILE.svg", help="sweep: also draw the table")
    return parser


def parse_arguments():
    """The command line, checked, with directories made for what is to be written, so that it fails
    now rather than after the work. Raises UserError."""
    args = make_parser().parse_args()
    if len(args.sources) != (2 if args.command == "compare" else 1):
        raise UserError("compare takes two sources, the others one")
    if args.command == "stats":
        if Path(args.out or "").suffix != ".npz":
            raise UserError("stats needs --out=FILE.npz")
        args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.command == "sweep" and not args.std:
        raise UserError("sweep needs --std")
    if args.command != "sweep" and len(args.guidance) > 1:
        raise UserError("--guidance: only sweep takes several")
    if args.plot and args.plot.suffix != ".svg":
        raise UserError(f"--plot: {args.plot} is not the name of a .svg file")
    return args


def sweep(args, run, reference, measure, device):
    """Print a table of distances of a run to a reference, by EMA width and guidance, from the same
    seeds throughout, and draw it if asked. reference: a name and its Statistics; measure: from
    Images to Statistics."""
    name, wanted = reference
    distances = {}  # by EMA width and guidance
    heads = [f"guidance {strength:g}" for strength in args.guidance]
    print("EMA width" + "".join(head.rjust(15) for head in heads))
    for std in args.std:
        row = f"{std:0<5}".ljust(9)
        for strength in args.guidance:
            images = open_run(run, args, device, std, strength)
            distances[std, strength] = distance(measure(run, images), wanted, (run, name))
            row += f"{distances[std, strength]:15.6g}"
            del images  # one network at a time: two may not fit a GPU
        print(row, flush=True)  # whole, since progress on stderr would overwrite a part
    std, strength = min(distances, key=distances.get)
    print(f"best: EMA width {std:0<5}, guidance {strength:g}")
    if args.plot and rank() == 0:
        from tools.plots import save_plot
        curves = {head: [(std, distances[std, strength]) for std in sorted(args.std)]
                  for head, strength in zip(heads, args.guidance)}
        label = f"Fréchet distance to {name}, {args.features}"
        save_plot(args.plot, curves, "EMA width", label)
        print(args.plot)


def main():
    join_processes()
    with together():
        args = parse_arguments()
        device = choose_device(args.device)
        names, widths = args.sources, [args.ema] * len(args.sources)
        if args.command == "sweep":  # a reference, and the run that is measured at each width
            names = [args.reference or dataset_of(args.sources[0]), args.sources[0]]
            widths = [args.ema, args.std[0]]
        features = load_features(args.features, args.weights, device)
        runs = [open_run(name, args, device, std, args.guidance[0])
                for name, std in zip(names, widths)]
        if args.command == "sweep" and not runs[1]:
            raise UserError(f"{names[1]} is no run directory to sweep")
        shape = next((run.shape for run in runs if run), None)
        sources = [run or read_statistics(name) or open_images(name, shape)
                   for name, run in zip(names, runs)]

    def measure(name, source):
        if isinstance(source, Statistics):
            return source
        return statistics(name, source, features, args.batch, device)

    first = measure(names[0], sources[0])
    if args.command == "stats":
        if rank() == 0:
            save_statistics(args.out, first)
        print(args.out)
    elif args.command == "compare":
        print(f"{distance(first, measure(names[1], sources[1]), names):.6g}")
    else:
        del runs, sources  # with them a network, to make room for those of the sweep
        sweep(args, names[1], (names[0], first), measure, device)
    leave_processes()


if __name__ == "__main__":
    run_main(main)
