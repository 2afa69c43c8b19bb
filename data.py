"""Any source of images made ready once, then read as arrays: `python data.py SOURCE` writes datasets/NAME/.

    python data.py fashion-mnist            # fetched by name: mnist, fashion-mnist, cifar10, cifar100
    python data.py ~/pictures --size=64     # a folder or zip of images or latents, idx, npz, a CIFAR archive

A set made ready is four files: images.npy, uint8 (N, C, S, S), or for latents float32 (N, 2C, S, S), the mean and
standard deviation of a VAE's posterior [EDM2]; labels.npy, int64 (N,); about.json, with class names, statistics and
hashes; contact-sheet.png, what the model will see. Why: all that is odd about files is met here, once, by one person,
not in the middle of a training on eight GPUs. Only this file knows formats; read it after sample.py.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import socket
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

DATASETS = Path(__file__).parent / "datasets"
warnings.filterwarnings("ignore", module="PIL")                             # whatever matters is raised


# ---- where errors go ----

class UserError(ValueError):
    """Something its user can mend, said in one line. Anything else but an OSError is a bug and keeps its traceback."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations and without a usage before each error. Why: an error is one line."""

    def __init__(self, description):
        super().__init__(description=description, usage=argparse.SUPPRESS, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(message)


def number(kind, low, high):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be {kind.__name__}, from {low:g} to {high:g}, not {text[:60]!r}")

    return parse


@contextmanager
def reading(name):
    """Turn whatever goes wrong inside into one UserError that names what is read. Why: libraries raise all kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error)
        text = text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
        text = " ".join(re.sub(r" <_io[^>]*>", "", text).split())[:300]
        raise UserError(text if str(name) in text else f"{name}: {text}") from error


def regular(path):
    """`path` as a Path, if there is a regular file. Why: opening a pipe would wait for ever. Raises ValueError."""
    if not Path(path).is_file():
        raise ValueError("there is no such file")
    return Path(path)


def run_main(main):
    """Run a script's main(): a UserError is one line and exit code 2, what the machine refuses is 1, Ctrl-C is 130."""
    try:
        try:
            main()
        finally:                                                            # after --help too, which exits
            sys.stdout.flush()
    except (UserError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):                              # or Python tries to flush once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        if text:                                                            # else another process says it
            print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
        sys.exit({UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1))


def progress(items, what, total, size=lambda item: 1):
    """Yield `items`, printing a line with rate and time left: overwritten on a terminal, every 10 seconds elsewhere."""
    begin = shown = time.monotonic()
    terminal, first, done = sys.stderr.isatty(), os.environ.get("RANK", "0") == "0", 0
    for item in items:
        yield item
        done, now = done + size(item), time.monotonic()
        if first and (done == total or now - shown >= (0.2 if terminal else 10)):
            rate, shown = done / max(now - begin, 1e-9), now
            line = f"{what}: {done:,}/{total:,}  {rate:,.0f}/s  {(total - done) / rate:.0f} s left "
            print(line, end="\r" if terminal and done < total else "\n", file=sys.stderr, flush=True)


# ---- a set made ready ----

@dataclass
class Dataset:
    """A set made ready: images (N, C, S, S) and labels (N,), mapped from disk, and what about.json says of them."""

    images: np.ndarray
    labels: np.ndarray
    about: dict

    def __len__(self):
        return len(self.images)

    @property
    def latent(self):
        return self.images.dtype == np.float32

    @property
    def shape(self):
        """(C, S, S) as the network sees it."""
        return (self.images.shape[1] // (2 if self.latent else 1), *self.images.shape[2:])

    @property
    def facts(self):
        """What a run keeps of its data: enough to undo the normalisation, to name classes and to know the set again."""
        return {"latent": bool(self.latent)} | {name: self.about[name] for name in (
            "mean", "std", "classes", "counts", "hashes")}

    def feed(self, index_lists, device):
        """Yield [images, labels] on `device` for each array of indices. Why a thread: it reads ahead during a step."""
        def read(indices):
            tensors = [torch.from_numpy(array[indices]) for array in (self.images, self.labels)]
            return [tensor.pin_memory() if device.type == "cuda" else tensor for tensor in tensors]

        index_lists = iter(index_lists)
        with ThreadPoolExecutor(1) as reader:
            waiting = deque(reader.submit(read, indices) for indices in islice(index_lists, 2))
            while waiting:
                tensors = waiting.popleft().result()
                waiting.extend(reader.submit(read, indices) for indices in islice(index_lists, 1))
                yield [tensor.to(device, non_blocking=True) for tensor in tensors]


def load_dataset(name):
    """The set made ready as datasets/<name>, or in the directory `name`. Raises UserError that says how to get it."""
    folder = Path(name) if (Path(name) / "about.json").is_file() else DATASETS / name
    if not (folder / "about.json").is_file():
        if name in DOWNLOADS or Path(name).exists():
            raise UserError(f"dataset: {name} is not made ready yet; do it once with: python data.py {name}")
        ready = ", ".join(sorted(path.parent.name for path in DATASETS.glob("[!.]*/about.json")))
        raise UserError(f"dataset: there is no {name[:200]!r}; ready are {ready}; python data.py makes others ready")
    with reading(folder):
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        images = np.load(regular(folder / "images.npy"), mmap_mode="r", allow_pickle=False)
        labels = np.load(regular(folder / "labels.npy"), mmap_mode="r", allow_pickle=False)
        dataset, stds = Dataset(images, labels, about), np.array(about["std"])
        if not (about["format"] == 1 and images.ndim == 4 and images.shape[2] == images.shape[3]
                and images.dtype in (np.uint8, np.float32) and labels.shape == images.shape[:1]
                and np.bincount(labels).tolist() == (about["counts"] or [len(images)])
                and np.isfinite(about["mean"]).all() and np.isfinite(stds).all() and (stds > 0).all()):
            raise ValueError("its files do not fit together, or are of another version; make the set ready again")
        to_network(torch.zeros(1, *dataset.shape), about)                   # raises if the statistics do not fit
    return dataset


@lru_cache(maxsize=2)
def epoch_order(size, seed, epoch):
    """The order in which one epoch shows a dataset: a permutation of 0..size-1."""
    return np.random.default_rng((seed, epoch)).permutation(size)


def batch_indices(size, seed, start, count):
    """Indices of the images number start .. start+count-1 ever shown: epochs follow each other, each a new shuffle.
    Why a function of its arguments alone: a run can stop anywhere and go on, on any number of processes."""
    parts = []
    while count > 0:
        epoch, offset = divmod(start, size)
        parts.append(epoch_order(size, seed, epoch)[offset:offset + count])
        start, count = start + len(parts[-1]), count - len(parts[-1])
    return np.concatenate(parts)


def to_network(images, facts):
    """What the network sees: float32 with mean 0 and standard deviation 0.5 over the set, as [EDM] assumes of data."""
    mean, std = (torch.tensor(facts[name], device=images.device).view(-1, 1, 1) for name in ("mean", "std"))
    return (images.float() - mean) * (0.5 / std)


def from_network(x, facts):
    """Undo `to_network`."""
    mean, std = (torch.tensor(facts[name], device=x.device).view(-1, 1, 1) for name in ("mean", "std"))
    return x * (std / 0.5) + mean


def to_uint8(x, facts):
    """Undo `to_network` for pixels: rounded and clipped to 0..255."""
    return from_network(x, facts).round().clamp(0, 255).to(torch.uint8)


# ---- sources: each reader returns images, labels or None, and class names or None ----

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".npy"}


class Pictures:
    """The pictures, or .npy latents, among the files of a folder or zip, as a sequence of arrays (C, H, W), by name.
    Why one class: a folder and a zip are the same thing, names and bytes."""

    def __init__(self, source):
        self.source = source
        if source.is_dir():
            files = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
            self.open = lambda name: open(files[name], "rb")
        else:
            archive = zipfile.ZipFile(source)
            files, self.open = archive.namelist(), archive.open
        self.has_table = "dataset.json" in files
        self.names = sorted(name for name in files if Path(name).suffix.lower() in SUFFIXES)
        if not self.names:
            raise ValueError("there are no images in it")
        self.latent = self.names[0].endswith(".npy")
        if any(name.endswith(".npy") != self.latent for name in self.names):
            raise ValueError("holds both pictures and .npy latents")
        self.mode = "L" if self.latent or all(self.is_grey(name) for name in self.names) else "RGB"

    def __len__(self):
        return len(self.names)

    def is_grey(self, name):
        with reading(f"{self.source}/{name}"), self.open(name) as file, Image.open(file) as image:
            return image.mode in ("1", "L")

    def __getitem__(self, i):
        name = self.names[i]
        with reading(f"{self.source}/{name}"), self.open(name) as file:
            data = BytesIO(file.read(2**30))                                # whatever the entry says of its size
            if not self.latent:
                return to_pixels(Image.open(data), self.mode)
            image = np.load(data, allow_pickle=False)
            if image.dtype != np.float32 or image.ndim != 3 or image.shape[0] % 2 or not np.isfinite(image).all():
                raise ValueError("must be float32 (2C, S, S), mean and std of a posterior")
            return image

    def labels(self):
        """A label for each image and the class names: by dataset.json [EDM2], by folder, or None, None."""
        if self.has_table:
            with reading(f"{self.source}/dataset.json"), self.open("dataset.json") as file:
                table = dict(json.loads(file.read(2**30))["labels"] or {})
                return as_labels([table[name] for name in self.names]) if table else (None, None)
        folders = [name.split("/")[:-1] for name in self.names]
        depth = len(os.path.commonprefix(folders))                          # classes are the first folders that differ
        flat = [name for name, folder in zip(self.names, folders) if len(folder) == depth]
        if flat and len(flat) < len(folders):
            raise ValueError(f"{flat[0]} lies beside the folders of the classes")
        return (None, None) if flat else as_labels([folder[depth] for folder in folders])


def to_pixels(image, mode, size=None):
    """A Pillow image as uint8 (C, H, W); with `size`, its central square resized to that side. Raises ValueError where
    something would be lost unseen."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":         # MPO: a phone's photo with a second
        raise ValueError(f"is animated, {image.n_frames} frames")
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"has more than 8 bits a channel (mode {image.mode})")
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        raise ValueError("has an alpha channel; flatten it first")
    image = ImageOps.exif_transpose(image).convert(mode)
    if size:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def as_labels(values):
    """Labels 0, 1, ... and class names for one value an image, whole numbers or texts: classes are those that occur."""
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iuU":
        raise ValueError("labels must be one whole number, or one text, for each image")
    names, labels = np.unique(values, return_inverse=True)
    return labels.astype(np.int64), [str(name) for name in names]


def read_idx(path):
    """An idx file of bytes, plain or .gz, as an array: 0, 0, 8, number of dimensions; their sizes; the values."""
    with reading(path), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
        if zeros or kind != 8:
            raise ValueError("not an idx file of bytes")
        sizes = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        return np.frombuffer(file.read(math.prod(sizes)), np.uint8).reshape(sizes)


def from_idx(path):
    """MNIST's format: NAME-images-idx3-ubyte, NAME-labels-idx1-ubyte beside it if there is one, each .gz or not."""
    name = re.sub(r"images([-.])idx3", r"labels\1idx1", path.name.removesuffix(".gz"))
    beside = [path.with_name(other) for other in (name, f"{name}.gz") if other != path.name]
    found = [other for other in beside if other.is_file()]
    return read_idx(path)[:, None], *(as_labels(read_idx(found[0])) if found else (None, None))


def from_cifar(path):
    """The training part of CIFAR-10's or CIFAR-100's binary archive, read from the tar, with its class names."""
    parts, names = {}, None
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.rsplit("/", 1)[-1]
            if name in ("batches.meta.txt", "fine_label_names.txt"):
                names = tar.extractfile(member).read(2**20).decode().split()
            elif re.fullmatch(r"data_batch_\d\.bin|train\.bin", name):
                head = 2 if name == "train.bin" else 1                      # CIFAR-100: coarse label, label, pixels
                records = np.frombuffer(tar.extractfile(member).read(2**28), np.uint8).reshape(-1, head + 3072)
                parts[name] = records[:, -3073:]
    if not parts:
        raise ValueError("there is no data_batch_1.bin or train.bin in it, as CIFAR's binary archives have")
    records = np.concatenate([parts[name] for name in sorted(parts)])
    labels, classes = as_labels(records[:, 0])
    classes = [names[int(label)] for label in classes] if names else classes
    return records[:, 1:].reshape(-1, 3, 32, 32), labels, classes


def from_npz(path):
    """ADM's format: arr_0 uint8 (N, H, W, C) or (N, H, W), and if there are labels arr_1 or `labels`."""
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["arr_0"], file.get("arr_1", file.get("labels"))
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"needs images arr_0, uint8 (N, H, W, C), not {images.dtype} {images.shape}")
    images = images[..., None] if images.ndim == 3 else images
    images = images.transpose(0, 3, 1, 2)
    return images, *(as_labels(labels) if labels is not None else (None, None))


def open_source(path):
    """Images (an array or Pictures), labels and class names of a file or folder, by what it is. Raises UserError."""
    path, name = Path(path), Path(path).name.lower()
    with reading(path):
        if path.is_dir() or (path.is_file() and name.endswith(".zip")):
            pictures = Pictures(path)
            return pictures, *pictures.labels()
        regular(path)
        for pattern, reader in ((r"\.npz$", from_npz), (r"idx3", from_idx), (r"\.(tar|tar\.gz|tgz)$", from_cifar)):
            if re.search(pattern, name):
                images, labels, classes = reader(path)
                if not images.size:
                    raise ValueError("there are no images in it")
                if labels is not None and len(labels) != len(images):
                    raise ValueError(f"has {len(labels):,} labels for {len(images):,} images")
                return images, labels, classes
        raise ValueError("is none of: folder, .zip, .npz, idx3, .tar.gz")


DOWNLOADS = {                                                               # name: where from, {file: its SHA-256}
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"}),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", {
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"})}
FASHION = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def download(url, path, sha256):
    """Fetch a file that is not at `path` yet; it appears there whole, with this SHA-256 (or its beginning), or not."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)                                        # torch.hub has no time-out of its own
        with reading(f"cannot download {url}; try again, or put the file at {path}"):
            torch.hub.download_url_to_file(url, str(path), sha256)


# ---- make ready ----

def write_set(folder, images, labels, classes, size, about):
    """Write images (an array or Pictures), labels and names as a set into `folder`; size: the side to resize to."""
    first, sha, source = images[0], hashlib.sha256(), about["source"]
    if size and (first.dtype != np.uint8 or len(first) not in (1, 3)):
        raise UserError(f"--size: {source} holds latents, or {len(first)} channels, which cannot be resized")
    latent, shape = first.dtype == np.float32, (len(first), size, size) if size else first.shape
    moments = np.zeros((2, len(first) // 2 if latent else 1))               # sums of x and x² for each channel
    with open(folder / "images.npy", "wb") as file:                         # not mapped: a full disk would kill us
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (len(images), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for i, image in enumerate(progress(images, "images made ready", len(images))):
            if size:
                image = to_pixels(to_picture(image), "L" if len(image) == 1 else "RGB", size)
            if image.shape != shape or shape[1] != shape[2]:
                name = images.names[i] if isinstance(images, Pictures) else f"image {i}"
                raise UserError(f"{source}: {name} is {image.shape[2]}x{image.shape[1]}, and all must be square and of "
                                "one size: choose one with --size")
            image = np.ascontiguousarray(image)
            file.write(image)
            sha.update(image)
            mean, std = np.split(image.astype(float), 2) if latent else (image.astype(float).reshape(1, -1, 1), 0.0)
            moments += mean.mean((1, 2)), (mean**2 + std**2).mean((1, 2))
    mean, square = moments / len(images)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    if not std.all():
        raise UserError(f"{source}: all images are alike")
    labels = np.zeros(len(images), np.int64) if labels is None else labels
    hashes = {"images": sha.hexdigest(), "labels": hashlib.sha256(labels).hexdigest(),
              "classes": hashlib.sha256(json.dumps(classes).encode()).hexdigest()}
    about |= {"format": 1, "classes": classes or [], "counts": np.bincount(labels).tolist() if classes else [],
              "mean": mean.tolist(), "std": std.tolist(), "hashes": hashes}
    np.save(folder / "labels.npy", labels)
    (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    to_picture(contact_sheet(load_dataset(folder))).save(folder / "contact-sheet.png")


def to_picture(image):
    """One image (1 or 3, H, W), uint8, for Pillow."""
    image = np.asarray(image)
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def make_grid(images, columns):
    """Images (N, C, S, S), uint8, as one (C, H, W), row by row; small ones are enlarged by whole pixels."""
    enlarge = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    cell, rows = images.shape[-1] + 2, -(-len(images) // columns)
    sheet = torch.full((images.shape[1], rows * cell + 2, columns * cell + 2), 48, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * cell + 2, i % columns * cell + 2
        sheet[:, top:top + cell - 2, left:left + cell - 2] = image
    return sheet


def contact_sheet(dataset):
    """Ten images of each of the first 16 classes, or 100 without labels; of latents, three channels of their means."""
    order, classes = epoch_order(len(dataset), 0, 0), dataset.about["classes"]
    rows = [order[dataset.labels[order] == label][:10] for label in range(min(len(classes), 16))]
    rows = rows or np.array_split(order[:100], 10)
    channels = 1 if dataset.shape[0] < 3 else 3
    sheet = torch.zeros(len(rows), 10, channels, *dataset.shape[1:], dtype=torch.uint8)     # short rows end in black
    for cells, row in zip(sheet, rows):
        images = torch.from_numpy(dataset.images[row])
        if dataset.latent:
            images = to_network(images[:, :dataset.shape[0]], dataset.about).add(1).mul(127.5).clamp(0, 255)
        cells[:len(row)] = images[:, :channels].to(torch.uint8)
    return make_grid(sheet.flatten(0, 1), 10)


def main():
    parser = Parser(__doc__)
    parser.add_argument("source", help=f"{', '.join(DOWNLOADS)}, or the path of a folder or file")
    parser.add_argument("--name", help="the set goes to datasets/NAME (default: the source's name, and -SIZE)")
    parser.add_argument("--size", type=number(int, 1, 8192), help="crop images to their centre, resize to this side")
    parser.add_argument("--overwrite", action="store_true", help="replace a set of that name")
    args = parser.parse_args()
    path, named = Path(args.source), args.source in DOWNLOADS
    stem = re.sub(r"(\.(zip|npz|tar|tgz|gz))+$", "", Path(os.path.abspath(path)).name, flags=re.IGNORECASE)
    name = args.name or (f"{stem}-{args.size}" if args.size else stem)
    if not re.fullmatch(r"\w[\w .+-]{0,99}", name) or name == "downloads" or not args.source:
        raise UserError(f"--name: {name[:60]!r} is not made of letters, digits and . + - _")
    folder, about = DATASETS / name, {"source": args.source if named else os.path.abspath(path), "size": args.size}
    if folder.exists() and not (args.overwrite and (folder / "about.json").is_file()):
        dataset = load_dataset(name)
        if any(dataset.about.get(key) != value for key, value in about.items()) and (named or path.exists()):
            raise UserError(f"{folder} was made from {dataset.about['source']}, size {dataset.about['size']}; give "
                            "another --name, or --overwrite")
        print(f"{folder} is ready")
    else:
        if named:
            base, files = DOWNLOADS[args.source]
            paths = [DATASETS / "downloads" / args.source / file for file in files]
            for target, sha256 in zip(paths, files.values()):
                download(base + target.name, target, sha256)
            path = paths[0]
        images, labels, classes = open_source(path)
        classes = FASHION if args.source == "fashion-mnist" else classes
        with tempfile.TemporaryDirectory(dir=DATASETS, prefix=".making-") as made:
            made = Path(made) / name
            made.mkdir()
            write_set(made, images, labels, classes, args.size, about)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        dataset = load_dataset(name)
    C, S, _ = dataset.shape
    print(f"{len(dataset):,} {'latents' if dataset.latent else 'images'}, {S}x{S}, channels: {C}, "
          f"mean {dataset.about['mean']}, standard deviation {dataset.about['std']}")
    pairs = [f"{name} {count:,}" for name, count in zip(dataset.about["classes"], dataset.about["counts"])]
    print(f"{len(pairs)} classes: {', '.join(pairs[:16])}{', ...' * (len(pairs) > 16)}" if pairs else "no labels")
    print(folder / "contact-sheet.png")


if __name__ == "__main__":
    run_main(main)
