"""Datasets, whatever their format: a name that `python data.py NAME` fetches, or the path of a file or folder.

Only this file knows formats. The rest sees raw images and labels: uint8 (N, C, S, S), or for latents float32 (N, 2C, S, S), the
mean and the standard deviation of a VAE's posterior [EDM2]; labels int64, 0 to num_classes - 1.

    python data.py fashion-mnist      # fetch (mnist, cifar10, cifar100 too), describe, and draw a contact sheet
    python data.py PATH               # describe and draw any dataset: what the model will see
"""

import argparse
import gzip
import hashlib
import json
import mmap
import os
import pickletools
import re
import signal
import struct
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import urllib.response
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

HERE = Path(__file__).parent / "datasets"
IN_MEMORY = 2**30                                                           # bytes of raw images; larger sets stream from disk
MEASURED = 10000                                                            # images whose mean and std stand for a streamed set's


# ---- what every dataset offers ----

@dataclass
class Dataset:
    """A set of images, in memory as one tensor or read from disk one by one.

    images: raw (N, C, S, S), or None. read: without them, a function from an index to one raw image as a numpy array.
    shape: (C, S, S) as the network sees it. latent: whether images are posteriors. stats: mean and std of what the network
    sees, computed at first use; the run stores them, since sampling has to undo them: one number each for pixels, one a
    channel for latents.
    """

    images: torch.Tensor | None
    labels: torch.Tensor
    num_classes: int
    read: object = None

    def __post_init__(self):
        raw = self.images[0] if self.read is None else torch.from_numpy(self.read(0))
        self.latent = raw.dtype == torch.float32
        self.shape = (raw.shape[0] // 2 if self.latent else raw.shape[0], *raw.shape[1:])

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        """A whole batch, for the workers of `feed`; or, for what cannot be read, the message to end with."""
        try:
            return np.stack([self.read(i) for i in indices]), self.labels[indices].numpy()      # cheaper to send than tensors
        except ValueError as error:
            return str(error)

    def raw(self):
        """Yield raw images in pieces: all, or of a streamed set the first MEASURED of a fixed random order."""
        if self.read is None:
            yield from self.images.split(4096)
        else:
            for indices in epoch_order(len(self), 0, 0)[:MEASURED].split(256):
                yield torch.from_numpy(np.stack([self.read(i) for i in indices.tolist()]))

    @cached_property
    def channel_stats(self):
        """[(mean, standard deviation)] of each channel, in float64; of a posterior's draws for latents."""
        count, total, square = 0, 0.0, 0.0
        for raw in self.raw():
            if self.latent:
                mean, std = raw.double().chunk(2, dim=1)
                values, squares = mean.sum((0, 2, 3)), (mean.square() + std.square()).sum((0, 2, 3))
            else:                                                           # histograms are exact, and need no float copy
                histogram = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in raw.unbind(1)]).double()
                values, squares = histogram @ torch.arange(256.0).double(), histogram @ torch.arange(256.0).double().square()
            count, total, square = count + raw[:, 0].numel(), total + values, square + squares
        mean = total / count
        return list(zip(mean.tolist(), (square / count - mean.square()).clamp(min=0).sqrt().tolist()))

    @cached_property
    def stats(self):
        means, stds = (np.array(values) for values in zip(*self.channel_stats))
        if self.latent:
            return {"mean": means.tolist(), "std": stds.tolist(), "latent": True}
        mean = means.mean()                                                 # every channel has as many values
        return {"mean": float(mean), "std": float(np.sqrt((stds**2 + means**2).mean() - mean**2)), "latent": False}

    def feed(self, index_lists, device, workers=0):
        """Raw images and labels on `device` for each list of indices in turn, read ahead by worker processes if not in memory."""
        if self.read is None:
            images, labels = self.images.to(device), self.labels.to(device)
            for indices in index_lists:
                indices = indices.to(device)
                yield images[indices], labels[indices]
        else:
            loader = torch.utils.data.DataLoader(self, batch_sampler=(indices.tolist() for indices in index_lists), num_workers=workers,
                                                 collate_fn=lambda batch: batch, prefetch_factor=8 if workers else None,
                                                 worker_init_fn=follow_parent, multiprocessing_context="fork" if workers else None)
            for batch in loader:
                if isinstance(batch, str):
                    raise ValueError(batch)
                tensors = (torch.from_numpy(array) for array in batch)
                yield tuple(tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device) for tensor in tensors)


def follow_parent(worker):
    """In a worker process: leave signals to the parent, which may want to finish its step, and end when it is gone, however it went."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def to_network(images, stats):
    """What the network sees: float32 with mean 0 and standard deviation 0.5 over the dataset."""
    mean, std = (torch.tensor(stats[name], device=images.device).view(-1, 1, 1) for name in ("mean", "std"))
    return (images.float() - mean) * (0.5 / std)


def from_network(x, stats):
    """Undo `to_network`."""
    mean, std = (torch.tensor(stats[name], device=x.device).view(-1, 1, 1) for name in ("mean", "std"))
    return x * (std / 0.5) + mean


def to_uint8(x, stats):
    """Undo `to_network` for pixels: rounded and clipped to 0..255."""
    return from_network(x, stats).round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=2)
def epoch_order(size, seed, epoch):
    """The order in which one epoch shows a dataset: a permutation of 0..size-1."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(size))


def batch_indices(size, seed, start, count):
    """Indices of the images number start .. start+count-1 ever shown: epochs follow each other, each a new shuffle.

    A function of its arguments alone, so that a run can stop anywhere and go on, on any number of processes.
    """
    parts = []
    while count > 0:
        epoch, offset = divmod(start, size)
        parts.append(epoch_order(size, seed, epoch)[offset:offset + count])
        start, count = start + len(parts[-1]), count - len(parts[-1])
    return torch.cat(parts)


# ---- formats: each a function from a path to a Dataset; ValueError, in one line, names the file and what is wrong ----

def make_labels(labels, where, num_classes=0):
    """Labels as a tensor, and the number of classes. Raises ValueError for labels that cannot be."""
    try:
        labels = np.asarray(labels)
    except ValueError:
        labels = np.empty(0)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
        raise ValueError(f"{where}: labels must be one whole number for each image")
    bad = (labels < 0) | (labels >= (num_classes or 2**31))
    if bad.any():
        raise ValueError(f"{where}: label {labels[bad.argmax()]} of image {bad.argmax()} is out of range")
    if labels.max() == 0:
        raise ValueError(f"{where}: there is only one class, so labels say nothing; leave them away (images in one flat folder have none)")
    return torch.from_numpy(labels.astype(np.int64)), num_classes or int(labels.max()) + 1


def read_idx(path):
    """An idx file, plain or .gz, as a numpy array: magic 0, 0, 8 (uint8), dimensions; their sizes; the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read, is it whole? ({error})") from None
    if data[:3] != b"\0\0\x08" or len(data) < 4:
        raise ValueError(f"{path}: not an idx file of bytes, it begins with {data[:4].hex()}")
    sizes = struct.unpack(f">{data[3]}I", data[4:4 + 4 * data[3]]) if len(data) >= 4 + 4 * data[3] else (0,)
    if len(data) - 4 - 4 * data[3] != np.prod(sizes):
        raise ValueError(f"{path}: holds {len(data) - 4 - 4 * data[3]} bytes, but its header says {sizes}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)


def load_idx(path, num_classes=0):
    """MNIST's format: NAME-images-idx3-ubyte with NAME-labels-idx1-ubyte beside it, if there is one, either of them .gz or not."""
    images = read_idx(path)
    if images.ndim != 3 or images.shape[1] != images.shape[2] or not images.size:
        raise ValueError(f"{path}: must hold square images (N, S, S), not {images.shape}")
    images, name = torch.from_numpy(images.copy())[:, None], re.sub(r"images([-.])idx3", r"labels\1idx1", path.name.removesuffix(".gz"))
    beside = next((path.with_name(other) for other in (name, name + ".gz") if other != path.name and path.with_name(other).exists()), None)
    if beside is None:
        return Dataset(images, torch.zeros(len(images), dtype=torch.long), 0)
    labels = read_idx(beside)
    if labels.shape != (len(images),):
        raise ValueError(f"{beside}: has {labels.size} labels for {len(images)} images")
    return Dataset(images, *make_labels(labels, beside, num_classes))


def parse_python_batch(data, where):
    """Images and labels of one batch of CIFAR's "python version", found in the pickle without unpickling it."""
    pixels, labels, last, fortran = None, [], None, False
    try:
        for opcode, value, _ in pickletools.genops(data):
            if opcode.name in ("NEWTRUE", "NEWFALSE"):                      # the last before the pixels is the array's order
                fortran = opcode.name == "NEWTRUE" if pixels is None else fortran
            elif isinstance(value, (str, bytes)):
                raw = value.encode("latin-1") if isinstance(value, str) else value
                if len(raw) >= 3072 and len(raw) % 3072 == 0:
                    pixels = np.frombuffer(raw, np.uint8).reshape(-1, 3, 32, 32)
                elif raw.endswith(b"labels") or raw in (b"data", b"filenames", b"batch_label"):
                    last = raw
            elif opcode.name in ("BININT", "BININT1", "BININT2", "INT") and last in (b"labels", b"fine_labels"):
                labels.append(value)
    except (ValueError, UnicodeError) as error:
        raise ValueError(f"{where}: not a CIFAR batch ({error})") from None
    if fortran:
        raise ValueError(f"{where}: its array is in Fortran order, unlike CIFAR's")
    if pixels is None or not len(labels) == len(pixels) > 0:
        raise ValueError(f"{where}: not a CIFAR batch, {len(labels)} labels for {0 if pixels is None else len(pixels)} images")
    return pixels, np.array(labels)


def load_cifar(path):
    """CIFAR-10 or CIFAR-100, the python or the binary archive, read from the tar as it is. Only the training set."""
    images, labels, num_classes = [], [], 10
    try:
        with tarfile.open(path) as tar:
            for member in sorted(tar, key=lambda member: member.name):      # the published batches, in their order
                name = member.name.rsplit("/", 1)[-1]
                if not re.fullmatch(r"data_batch_\d+(\.bin)?|train(\.bin)?", name) or not member.isfile():
                    continue
                data, where = tar.extractfile(member).read(), f"{path}: {member.name}"
                num_classes = 100 if name.startswith("train") else 10
                if name.endswith(".bin"):                                   # coarse label, only in CIFAR-100; label; pixels
                    head = 2 if num_classes == 100 else 1
                    if not data or len(data) % (head + 3072):
                        raise ValueError(f"{where}: {len(data)} bytes are no whole number of images")
                    records = np.frombuffer(data, np.uint8).reshape(-1, head + 3072)
                    part = records[:, head:].reshape(-1, 3, 32, 32), records[:, head - 1]
                else:
                    part = parse_python_batch(data, where)
                images.append(part[0])
                labels.append(part[1])
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read, is it whole? ({error})") from None
    if not images:
        raise ValueError(f"{path}: no CIFAR archive, there is no data_batch or train in it")
    return Dataset(torch.from_numpy(np.concatenate(images)), *make_labels(np.concatenate(labels), path, num_classes))


def load_npz(path):
    """ADM's format: arr_0 uint8 (N, S, S, C) and, if there, labels arr_1. Or images (N, S, S) and labels."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    except Exception as error:                                              # zipfile's own
        raise ValueError(f"{path}: cannot be read ({type(error).__name__})") from None
    images, labels = arrays.get("arr_0"), arrays.get("arr_1", arrays.get("labels"))
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[1] != images.shape[2]:
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"{path}: needs square images arr_0, uint8 (N, S, S, C), but has {found}")
    if not images.size or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise ValueError(f"{path}: needs one or more images of 1 or 3 channels, but arr_0 is {images.shape}")
    images = torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
    if labels is None:
        return Dataset(images, torch.zeros(len(images), dtype=torch.long), 0)
    if labels.shape != (len(images),):
        raise ValueError(f"{path}: labels are {labels.dtype} {labels.shape} for {len(images)} images")
    return Dataset(images, *make_labels(labels, path))


def open_picture(file, where):
    """An image of Pillow's for the file; ValueError for one that would quietly lose something."""
    try:
        image = Image.open(file)
        frames, mode = getattr(image, "n_frames", 1), image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: does not decode ({str(error).replace(chr(10), ' ')[:80]})") from None
    if frames > 1 and image.format != "MPO":                                # what phones save, a photo with a second beside it
        raise ValueError(f"{where}: is animated, {frames} frames")
    if mode.startswith("I") or mode == "F":
        raise ValueError(f"{where}: has more than 8 bits a channel (mode {mode})")
    if mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        raise ValueError(f"{where}: has an alpha channel; flatten it first")
    return image


def decode_picture(image, where, size=0, channels=0):
    """Pixels uint8 (C, S, S) of an image, cropped to its central square and resized if `size` says so."""
    try:
        if "exif" in image.info:
            image = ImageOps.exif_transpose(image)
        mode = {1: "L", 3: "RGB"}[channels or (1 if image.mode in ("1", "L") else 3)]
        if image.mode != mode:
            image = image.convert(mode)
        if size:
            side, left, top = min(image.size), (image.width - min(image.size)) // 2, (image.height - min(image.size)) // 2
            image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        pixels = np.array(image)                                            # decodes, if nothing before did
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where}: does not decode ({str(error)[:80]})") from None
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))


SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def list_pictures(folder):
    """All image files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def load_folder(folder, size=0, channels=0):
    """A folder of images: a class for each sub-folder, or no labels if the images lie flat. Any size, with `size` said."""
    paths = list_pictures(folder)
    if not paths:
        raise ValueError(f"{folder}: there are no images in it")
    tops = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    names = sorted(set(tops))
    if "" in names and len(names) > 1:
        raise ValueError(f"{paths[tops.index('')]}: lies beside the folders of the classes")
    sizes, grey = set(), True
    for path in paths:
        with open_picture(path, path) as image:                             # reads the header only
            sizes.add(image.size)
            grey = grey and image.mode in ("1", "L")
    if not size and (len(sizes) > 1 or len(set(*sizes)) > 1):
        raise ValueError(f"{folder}: images are not all of one square size; choose one with --model.image_size, they are cropped and resized")

    def read(index):
        with open_picture(paths[index], paths[index]) as image:
            return decode_picture(image, paths[index], size, channels or (1 if grey else 3))

    if names == [""]:
        return from_files(read, torch.zeros(len(paths), dtype=torch.long), 0)
    return from_files(read, *make_labels([names.index(top) for top in tops], folder))


def from_files(read, labels, num_classes):
    """A dataset of what `read` reads, brought into memory if it fits."""
    first = read(0)
    if first.nbytes * len(labels) > IN_MEMORY:
        return Dataset(None, labels, num_classes, read)
    return Dataset(torch.from_numpy(np.stack([read(i) for i in range(len(labels))])), labels, num_classes)


# ---- EDM2's zips ----

class ZipIndex:
    """Where in a zip of uncompressed entries each of them lies, in arrays: zipfile takes a kilobyte an entry, this 16 bytes.

    names: in the order of the file. read(i): the bytes of entry i.
    """

    def __init__(self, path):
        self.path, self.file = path, open(path, "rb")
        try:
            with mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.names, self.offsets, self.sizes = self.parse(data)
        except (OSError, ValueError, struct.error, UnicodeError) as error:
            message = str(error) if str(error).startswith(str(path)) else f"{path}: no zip, or cut off ({error})"
            raise ValueError(message) from None

    def parse(self, data):
        """The central directory [PKWARE APPNOTE 4.3], with its 64-bit extension."""
        end = data.rfind(b"PK\5\6", max(0, len(data) - 65557))
        if end < 0:
            raise ValueError("its directory is missing")
        count, size, start = struct.unpack_from("<HII", data, end + 10)
        locator = end - 20
        if data[locator:locator + 4] == b"PK\6\7":                          # more than 65,535 entries, or 4 GB
            at, = struct.unpack_from("<Q", data, locator + 8)
            count, size, start = struct.unpack_from("<QQQ", data, at + 32)
        names, offsets, sizes = [], np.empty(count, np.int64), np.empty(count, np.int64)
        for i in range(count):
            (magic, flags, method, packed, plain, name_size, extra_size, comment_size, offset) = struct.unpack_from(
                "<4s4xHH8xIIHHH8xI", data, start)
            name = data[start + 46:start + 46 + name_size].decode()
            if magic != b"PK\1\2":
                raise ValueError("its directory is damaged")
            if 0xFFFFFFFF in (plain, packed, offset):
                extra, at = data[start + 46 + name_size:start + 46 + name_size + extra_size], 0
                while extra[at:at + 2] != b"\1\0":
                    at += 4 + struct.unpack_from("<H", extra, at + 2)[0]
                at += 4
                if plain == 0xFFFFFFFF:
                    plain, at = struct.unpack_from("<Q", extra, at)[0], at + 8
                if packed == 0xFFFFFFFF:
                    packed, at = struct.unpack_from("<Q", extra, at)[0], at + 8
                if offset == 0xFFFFFFFF:
                    offset, at = struct.unpack_from("<Q", extra, at)[0], at + 8
            if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
                raise ValueError(f"{self.path}: entry {name!r} leads outside")
            if (method or flags & 1) and not name.endswith("/"):
                raise ValueError(f"{self.path}: entry {name!r} is compressed or encrypted; EDM2's dataset tool stores plain entries")
            names.append(name)
            offsets[i], sizes[i] = offset, plain
            start += 46 + name_size + extra_size + comment_size
        return names, offsets, sizes

    def read(self, i):
        size = int(self.sizes[i])
        data = os.pread(self.file.fileno(), size + 512, int(self.offsets[i]))               # the entry and what it begins with;
        if data[:4] != b"PK\3\4" or len(data) < 30:                                        # without a position, so that worker
            raise ValueError(f"{self.path}: entry {i} is not where the directory says")     # processes may share the file
        start = 30 + sum(struct.unpack("<HH", data[26:30]))
        data = data[start:start + size]
        if len(data) < size:
            raise ValueError(f"{self.path}: entry {i} is cut off")
        return data


def load_zip(path):
    """EDM2's dataset zip: PNGs, or .npy posteriors of a VAE (8, S, S) float32, and dataset.json with their labels."""
    index = ZipIndex(path)
    wanted = [(name, i) for i, name in enumerate(index.names) if name.lower().endswith((".png", ".npy", ".jpg", ".jpeg"))]
    if not wanted:
        raise ValueError(f"{path}: there are no PNG or npy entries in it")
    wanted.sort()
    labels, num_classes = torch.zeros(len(wanted), dtype=torch.long), 0
    if "dataset.json" in index.names:
        try:
            table = json.loads(index.read(index.names.index("dataset.json")))["labels"]
            if table is not None:
                table = dict(table)
                labels, num_classes = make_labels([table[name] for name, _ in wanted], f"{path}: dataset.json")
        except KeyError as error:
            raise ValueError(f"{path}: dataset.json has no label for {error}") from None
        except (TypeError, json.JSONDecodeError, UnicodeError, AttributeError) as error:
            raise ValueError(f"{path}: dataset.json is no table of labels ({error})") from None
        del table
    entries = np.array([i for _, i in wanted])
    names = np.array([name.encode() for name, _ in wanted])                 # compact, and shared between processes
    index.names, wanted = None, None
    expected = None

    def read(i):
        where, data = f"{path}: entry {names[i].decode()!r}", index.read(entries[i])
        if where.endswith(".npy'"):
            image = read_posterior(data, where)
        else:
            with open_picture(BytesIO(data), where) as picture:
                image = decode_picture(picture, where)
        if expected is not None and image.shape != expected or image.shape[1] != image.shape[2]:
            raise ValueError(f"{where}: is {image.shape}, not {expected or 'square'}")
        return image

    expected = read(0).shape
    return from_files(read, labels, num_classes)


def read_posterior(data, where):
    """A .npy of the mean and standard deviation of a latent, float32 (2C, S, S)."""
    try:
        image = np.load(BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{where}: is no plain npy ({str(error).splitlines()[0]})") from None
    if image.dtype != np.float32 or image.ndim != 3 or image.shape[0] % 2 or not image.size:
        raise ValueError(f"{where}: must be float32 (2C, S, S), mean and std of a posterior, not {image.dtype} {image.shape}")
    return image


# ---- datasets by name ----

def load_digits():
    """The UCI handwritten digits (E. Alpaydin, C. Kaynak; CC BY 4.0): 1797 images 8×8 of the digits 0 to 9."""
    with np.load(HERE / "digits.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    images = np.round(images * (255 / 16)).astype(np.uint8)                 # stored as 0..16
    return Dataset(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long(), num_classes=10)


MNIST_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
DOWNLOADS = {                                                               # name: where from, {file: its MD5 as published}
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/",
              dict(zip(MNIST_FILES, ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432")))),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                      dict(zip(MNIST_FILES, ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe")))),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/", {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"}),
}


NAMES = ("digits", *DOWNLOADS)


def find_download(name):
    """The folder that holds the files of a dataset by name, or None: datasets/NAME here, or where the system has them."""
    folders = [HERE / name, *(Path(prefix) / "share" / "datasets" / name for prefix in (sys.prefix, sys.base_prefix, "/usr"))]
    return next((folder for folder in folders if all((folder / file).exists() for file in DOWNLOADS[name][1])), None)


def load_dataset(name, size=0, channels=0):
    """The dataset called `name`, or at the path `name`. Raises ValueError, in one line, if it cannot be had.

    size, channels: what a folder of images is cropped, resized and converted to (0: as they are).
    """
    if name == "digits":
        return load_digits()
    path = Path(name)
    if name in DOWNLOADS:
        folder = find_download(name)
        if not folder:
            raise ValueError(f"dataset: {name} is not here yet; fetch it with: python data.py {name}")
        path = folder / next(iter(DOWNLOADS[name][1]))
        return load_cifar(path) if name.startswith("cifar") else load_idx(path, num_classes=10)
    if path.is_dir():
        return load_folder(path, size, channels)
    if not path.is_file():
        raise ValueError(f"dataset: there is no {name!r}: no file, no folder, nor one of {', '.join(NAMES)}")
    if path.suffix == ".npz":
        return load_npz(path)
    if path.suffix == ".zip":
        return load_zip(path)
    if re.search(r"\.(tar|tar\.gz|tgz)$", path.name):
        return load_cifar(path)
    if "idx3" in path.name:
        return load_idx(path)
    raise ValueError(f"dataset: {name}: not a format of ours (idx3, .npz, .zip, .tar.gz, or a folder of images)")


# ---- fetch, describe ----

def open_url(request, have):
    """The answer to a request; an empty one if all bytes are here already, which a server calls an unsatisfiable range."""
    try:
        return urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if not (have and error.code == 416):
            raise
        return urllib.response.addinfourl(BytesIO(), {}, error.url, 206)


def fetch(name):
    """Download the files of a dataset into datasets/NAME, going on where an interrupted download stopped; each appears
    under its name only when it is whole and its hash right. Raises ValueError, in one line, that says what to put where."""
    base, files = DOWNLOADS[name]
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, expected in files.items():
        path, part = folder / file, folder / f"{file}.part"
        if path.exists():
            continue
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(base + file, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with open_url(request, have) as source, open(part, "ab" if have else "wb") as out:
                if have and source.status != 206:                           # it sends the whole again
                    out.truncate(0)
                    have = 0
                total, begin = have + int(source.headers.get("Content-Length", 0)), time.monotonic()
                while block := source.read(2**20):
                    out.write(block)
                    done = out.tell()
                    rate = (done - have) / (time.monotonic() - begin + 1e-9)
                    print(f"{file}: {done / 1e6:.1f}/{total / 1e6:.1f} MB  {rate / 1e6:.1f} MB/s  {(total - done) / rate:.0f} s left",
                          end="\r" if sys.stderr.isatty() and done < total else "\n", file=sys.stderr, flush=True)
            if part.stat().st_size < total:
                raise OSError("the connection broke off")
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            raise ValueError(f"cannot download {base + file} ({reason}); try again, or put the file at {path}") from None
        with open(part, "rb") as whole:
            digest = hashlib.file_digest(whole, "md5").hexdigest()
        if digest != expected:
            part.unlink()
            raise ValueError(f"{base + file}: came with MD5 {digest}, not {expected}; it is thrown away, try again")
        os.replace(part, path)


def to_picture(image):
    """One image (1 or 3, H, W), uint8, for Pillow."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


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
    order = epoch_order(len(dataset), 0, 0)
    rows = [order[dataset.labels[order] == label][:10] for label in range(min(dataset.num_classes, 16))] or list(order[:100].split(10))
    images = [torch.from_numpy(dataset.read(i)) if dataset.read else dataset.images[i] for row in rows for i in row.tolist()]
    images = torch.stack(images)
    if dataset.latent:
        images = to_network(images[:, :dataset.shape[0]], dataset.stats)[:, :3].add(1).mul(127.5).clamp(0, 255).to(torch.uint8)
    images = images if images.shape[1] in (1, 3) else images[:, :1]
    sheet = images.new_zeros(len(rows), 10, *images.shape[1:])              # short rows end in black
    for row, part in zip(sheet, images.split([len(row) for row in rows])):
        row[:len(part)] = part
    return make_grid(sheet.flatten(0, 1), 10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help=f"{', '.join(NAMES)}, or a path")
    parser.add_argument("--size", type=int, default=0, help="crop and resize a folder of images to this side")
    parser.add_argument("-o", "--out", type=Path, default=Path("contact-sheet.png"), help="the sheet to write (default: contact-sheet.png)")
    args = parser.parse_args()
    try:
        if args.dataset in DOWNLOADS and not find_download(args.dataset):
            fetch(args.dataset)
        dataset = load_dataset(args.dataset, args.size)
        contact = to_picture(contact_sheet(dataset))
    except ValueError as error:
        parser.error(str(error))
    C, S, _ = dataset.shape
    print(f"{len(dataset):,} images, {S}x{S}, {C} channels{', latents' if dataset.latent else ''}, "
          f"{'in memory' if dataset.read is None else 'read from disk'}")
    counts = dataset.labels.bincount().tolist()
    print(f"{dataset.num_classes} classes, {min(counts):,} to {max(counts):,} images each" if dataset.num_classes else "no labels")
    for c, (mean, std) in enumerate(dataset.channel_stats):
        print(f"channel {c}: mean {mean:.3f}, standard deviation {std:.3f}")
    try:
        contact.save(args.out)
    except (OSError, ValueError) as error:
        parser.error(f"--out: {args.out} ({error})")
    print(args.out)


if __name__ == "__main__":
    main()
