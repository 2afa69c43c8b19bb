"""Any source of images prepared once, then read as arrays: `python data.py SOURCE` writes datasets/NAME/.

    python data.py fashion-mnist            # fetched by name: mnist, fashion-mnist, cifar10, cifar100
    python data.py ~/pictures --size=64     # a folder or zip of images or latents, idx, npz, npy, a CIFAR archive

A set is images.npy, uint8 (N, C, S, S), or for latents float32 (N, 2C, S, S), mean and standard deviation of a VAE's
posterior [EDM2]; labels.npy, int64 (N,); holdout-images.npy and holdout-labels.npy, which training never sees;
about.json, with class names, statistics and hashes; contact-sheet.png, what the model will see. Why: whatever is odd
about files shows here, once, and not in the middle of a training on eight GPUs. Read it after sample.py.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import re
import signal
import socket
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

DATASETS = Path(__file__).parent / "datasets"
FORMAT = 2                                                                  # of a prepared set; 1 held nothing out
HEADER = 128                                                                # bytes of a .npy file before its values
warnings.filterwarnings("ignore", module="PIL")                             # whatever matters is raised


class UserError(ValueError):
    """A mistake that the user can correct, said in one line. Any other exception but OSError is a bug: a traceback."""


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
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} from {low:g} to {high:g}, not {text[:60]!r}")

    return parse


@contextmanager
def reading(name, errors=Exception):
    """Turn whatever goes wrong inside into one UserError that names what is read. Why: libraries raise all kinds.
    errors: the kinds to turn. Give it where a user's own code runs, whose bugs should keep their traceback."""
    try:
        yield
    except (UserError, NameError):
        raise
    except errors as error:
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


def say(text, end="\n"):
    """Print on stderr what the user should know. Why a function: of several processes only the first may say it."""
    if os.environ.get("RANK", "0") == "0":
        print(text, end=end, file=sys.stderr, flush=True)


def progress(items, what, total, size=lambda item: 1):
    """Yield `items`, printing a line with rate and time left: overwritten on a terminal, every 10 seconds elsewhere."""
    begin = shown = time.monotonic()
    terminal, done = sys.stderr.isatty(), 0
    for item in items:
        yield item
        done, now = done + size(item), time.monotonic()
        if done == total or now - shown >= (0.2 if terminal else 10):
            rate, shown = done / max(now - begin, 1e-9), now
            line = f"{what}: {done:,}/{total:,}  {rate:,.0f}/s  {(total - done) / rate:.0f} s left"
            say(f"\r\033[K{line}" if terminal else line, end="" if terminal and done < total else "\n")


@dataclass
class Dataset:
    """A prepared set, its arrays mapped from disk."""

    images: np.ndarray                                                      # (N, C, S, S), of latents (N, 2C, S, S)
    labels: np.ndarray                                                      # (N,)
    facts: dict                                                             # latent, mean, std, classes, counts, hashes
    holdout: "Dataset | None" = None                                        # the held-out part, with the same facts

    def __len__(self):
        return len(self.images)

    @property
    def shape(self):
        """(C, S, S) as the network sees it."""
        return (self.images.shape[1] // (2 if self.facts["latent"] else 1), *self.images.shape[2:])

    def feed(self, index_lists, device):
        """Yield [images, labels] on `device` for each array of indices. Why a thread: it reads ahead during a step."""
        def read(indices):
            tensors = [torch.from_numpy(array[indices]) for array in (self.images, self.labels)]
            return [tensor.pin_memory() if device.type == "cuda" else tensor for tensor in tensors]

        index_lists = iter(index_lists)
        with ThreadPoolExecutor(1) as reader:
            waiting = [reader.submit(read, indices) for indices in islice(index_lists, 2)]
            while waiting:
                tensors = waiting.pop(0).result()
                waiting += [reader.submit(read, indices) for indices in islice(index_lists, 1)]
                yield [tensor.to(device, non_blocking=True) for tensor in tensors]


def find_set(name):
    """The directory of the set prepared as datasets/<name>, or `name` itself if it is one, or None."""
    return next((folder for folder in (Path(name), DATASETS / name) if (folder / "about.json").is_file()), None)


def load_dataset(name):
    """The set prepared as datasets/<name>, or in the directory `name`. Raises UserError that says how to get it."""
    folder = find_set(name)
    if not folder:
        if name in DOWNLOADS or Path(name).exists():
            raise UserError(f"dataset: {name} is not prepared yet; do it once with: python data.py {name}")
        ready = ", ".join(sorted(path.parent.name for path in DATASETS.glob("[!.]*/about.json")))
        raise UserError(f"dataset: there is no {name[:200]!r}; ready: {ready}; python data.py SOURCE prepares others")
    with reading(folder):
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError("was prepared by another version of this code; do it again with --overwrite")
        facts, parts = about["facts"], []
        for part in ("", "holdout-"):
            images, labels = (np.load(regular(folder / f"{part}{file}.npy"), mmap_mode="r", allow_pickle=False)
                              for file in ("images", "labels"))
            if (images.shape != (len(labels), *images.shape[1:3], images.shape[2])
                    or images.dtype != (np.float32 if facts["latent"] else np.uint8)
                    or len(np.bincount(labels, minlength=len(facts["counts"]))) > len(facts["counts"])):
                raise ValueError("its files do not fit together; prepare the set again")
            parts.append(Dataset(images, labels, facts))
        dataset, holdout = parts
        if (np.bincount(dataset.labels).tolist() != facts["counts"] or dataset.shape != holdout.shape
                or not np.isfinite(facts["mean"] + facts["std"]).all() or min(facts["std"]) <= 0):
            raise ValueError("about.json does not fit its images; prepare the set again")
    return replace(dataset, holdout=holdout if len(holdout) else None)


def describe(facts):
    """How many images of which classes, in one line."""
    pairs = [f"{name} {count:,}" for name, count in zip(facts["classes"], facts["counts"])]
    classes = f"{len(pairs)} classes: {', '.join(pairs[:20])}{', ...' * (len(pairs) > 20)}" if pairs else "no classes"
    return f"{sum(facts['counts']):,} {'latents' if facts['latent'] else 'images'}, {classes}"


def differences(theirs, ours, leave_out=()):
    """In one line, what differs between two dicts: "seed = 0, not 1; ..."; empty if nothing does."""
    return "; ".join(f"{name} = {theirs.get(name)!r}, not {ours.get(name)!r}" for name in theirs | ours
                     if name not in leave_out and theirs.get(name) != ours.get(name))[:1000]


@lru_cache(maxsize=2)
def epoch_order(size, seed, epoch):
    """The order in which one epoch shows a dataset: a permutation of 0..size-1."""
    return np.random.default_rng((seed, epoch)).permutation(size)


def batch_indices(size, seed, start, count):
    """Indices of the images that training shows at places start .. start+count-1, every epoch being a new shuffle.
    Why a function of its arguments alone: a run can stop anywhere and go on, on any number of processes."""
    epochs, places = np.divmod(np.arange(start, start + count), size)
    return np.concatenate([epoch_order(size, seed, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])


def to_network(images, facts):
    """What the network sees: float32 with mean 0 and standard deviation 0.5 over the set, as [EDM] assumes of data."""
    mean, std = (torch.tensor(facts[name], device=images.device).view(-1, 1, 1) for name in ("mean", "std"))
    return (images.float() - mean) * (0.5 / std)


def from_network(x, facts):
    """Undo `to_network`; pixels are rounded and clipped to uint8, latents stay float32."""
    mean, std = (torch.tensor(facts[name], device=x.device).view(-1, 1, 1) for name in ("mean", "std"))
    x = x * (std / 0.5) + mean
    return x if facts["latent"] else x.round().clamp(0, 255).to(torch.uint8)


# What open_source() finds. images: a sequence of arrays (C, H, W), uint8 or float32; labels: int64 (N,), zeros if there
# are no classes; held_out: bool (N,), or None if the source has no such part; lines: what its user should know.
Source = namedtuple("Source", ["images", "labels", "classes", "held_out", "lines"])
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX/|Thumbs\.db$)")
HELD_OUT = {"t10k", "test", "testing", "val", "valid", "validation"}        # names of parts and of their folders
SPLITS = HELD_OUT | {"train", "training"}
IMAGE_STEMS = re.compile(r"(?:.*[-_.])?images(?:[-.]idx3-ubyte)?|x_(?:train|val|test)|arr_0|"
                         r"(?:data_batch_\d|test_batch|train|test)\.bin")   # MNIST, MedMNIST, Keras, ADM; CIFAR
LABEL_NAMES = {"images": "labels", "idx3": "idx1", "x_": "y_", "arr_0": "arr_1"}        # what their labels are called


def labels_of(images):
    """The path of the labels that belong to an array or file of images; CIFAR has both in the same file."""
    return re.sub(r"(images|idx3|\bx_|arr_0)(?=[^/]*$)", lambda found: LABEL_NAMES[found[0]], images)


def open_files(path):
    """The files of a folder, zip, npz or tar: their names, and a function that opens one by its name. A single file
    counts as a folder of itself and the labels beside it. Why: all other code then sees only names and bytes."""
    if path.is_dir():
        names, seen, folders, links = [], set(), [""], []
        while folders or links:                                             # links last: a class keeps its real name
            folder = (folders or links).pop()
            if os.path.realpath(path / folder) in seen:
                continue
            seen.add(os.path.realpath(path / folder))
            for entry in sorted(os.scandir(path / folder), key=lambda entry: entry.name, reverse=True):
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(f"{folder}{entry.name}/")
                else:
                    names.append(folder + entry.name)
        return names, lambda name: open(regular(path / name), "rb")
    if zipfile.is_zipfile(regular(path)):
        archive = zipfile.ZipFile(path)
        pairs, opener = [(entry.filename, entry) for entry in archive.infolist() if not entry.is_dir()], archive.open
    elif tarfile.is_tarfile(path):
        archive = tarfile.open(path)
        pairs, opener = [(member.name, member) for member in archive if not member.isdir()], archive.extractfile
    else:
        stem = path.name.removesuffix(".gz")
        beside = [path.with_name(labels_of(stem) + end) for end in ("", ".gz")]
        labels = [("labels", file) for file in beside if file.is_file() and labels_of(stem) != stem]
        pairs, opener = [("images", path), *labels[:1]], lambda file: open(file, "rb")
    files = {re.sub(r"^(\.?/)+", "", name.replace("\\", "/")): file for name, file in pairs}
    if len(files) < len(pairs):
        raise ValueError("holds several files of the same name")
    return list(files), lambda name: opener(files[name])


def read_array(open_file, name, field):
    """The array in a file: .npy, idx of bytes, or a field of CIFAR's records; gzipped or not, told by what it holds."""
    with open_file(name) as raw:
        file = gzip.open(raw) if raw.read(2) == b"\x1f\x8b" else raw
        raw.seek(0)
        head = file.read(6)
        file.seek(0)
        if head == b"\x93NUMPY":
            return np.load(file, allow_pickle=False)
        if name.endswith(".bin"):
            size = 3073 if "batch" in name else 3074                        # CIFAR-100 has a coarse label before
            records = np.frombuffer(file.read(2**28), np.uint8).reshape(-1, size)
            return records[:, -3073] if field == "labels" else records[:, -3072:].reshape(-1, 3, 32, 32)
        if len(head) < 4 or head[:3] != b"\0\0\x08":
            raise ValueError(f"{name} is neither .npy nor an idx file of bytes")
        sizes = np.frombuffer(file.read(4 + 4 * head[3]), ">u4")[1:].tolist()
        return np.frombuffer(file.read(math.prod(sizes)), np.uint8).reshape(sizes)


def as_images(array):
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W). Raises ValueError for what is not that."""
    shaped = array[..., None] if array.ndim == 3 else array                 # (N, H, W, 1)
    shaped = shaped.transpose(0, 3, 1, 2) if shaped.ndim == 4 and shaped.shape[3] in (1, 3) else shaped
    if array.dtype != np.uint8 or shaped.ndim != 4 or shaped.shape[1] not in (1, 3) or not array.size:
        raise ValueError(f"holds {array.dtype} {array.shape}; images are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) "
                         "with C 1 or 3; of values from 0 to 1 save (images * 255).round().astype('uint8')")
    return shaped


def as_labels(values):
    """Labels 0, 1, ... and names of classes, in natural order: 2 before 10. values: whole numbers, texts or one-hot."""
    values = np.asarray(values)
    values = values.ravel() if values.size == len(values) else values       # MedMNIST's are (N, 1)
    if values.ndim == 2 and np.isin(values, (0, 1)).all() and (values.sum(1) == 1).all():
        values = values.argmax(1)
    if values.dtype.kind == "f" and (abs(values) < 2**53).all() and (values % 1 == 0).all():
        values = values.astype(np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iubU" or not "".join(values.astype(str)).isprintable():
        raise ValueError("labels must be one whole number, one text or one one-hot vector for each image, printable")
    found, labels = np.unique(values.astype(str), return_inverse=True)
    order = np.argsort([re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name) for name in found], kind="stable")
    return np.argsort(order)[labels], found[order].tolist()


def from_arrays(stems, found, open_file):
    """Images, the values of their labels or None, and which images are held out or None, read from arrays.
    stems: {path without suffix: path} of all files; found: those stems that hold images, whose labels lie beside."""
    held = [len(found) > 1 and bool(HELD_OUT & set(re.split("[-_./]", stem.lower()))) for stem in found]
    if len({"data_batch" in stem or stem for stem, out in zip(found, held) if not out}) != 1:
        raise ValueError(f"holds several sets of images, {', '.join(found)[:200]}; choose the file of one")
    images, values = [], []
    for stem in found:
        beside = stems.get(labels_of(stem)) or stems.get(re.sub("[^/]*$", "labels", stem, count=1))
        images.append(as_images(read_array(open_file, stems[stem], "images")))
        if beside:
            values.append(read_array(open_file, beside, "labels"))
            if len(values[-1]) != len(images[-1]):
                raise ValueError(f"{beside} has {len(values[-1]):,} labels for {len(images[-1]):,} images")
    if len(values) not in (0, len(images)):
        raise ValueError("has labels for some of its images only")
    values = np.concatenate(values) if values else None
    for name in stems.values():
        if name.endswith(("batches.meta.txt", "fine_label_names.txt")):     # CIFAR's class names
            with open_file(name) as file:
                values = np.array(file.read(2**20).decode().split())[values]
    held_out = np.repeat(held, [len(array) for array in images]) if any(held) else None
    return np.concatenate(images) if len(images) > 1 else images[0], values, held_out


def to_picture(image):
    """One image (1 or 3, H, W), uint8, for Pillow."""
    image = np.asarray(image)
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def from_picture(image, changes):
    """A Pillow image as uint8 (1 or 3, H, W). changes: counts the losses that are accepted; others raise ValueError."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":         # MPO: a phone's photo with a second
        raise ValueError(f"is animated, {image.n_frames} frames")
    image.load()
    if image.info or image.format == "TIFF":                                # where an orientation would be
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F"):
        raise ValueError(f"has more than 16 bits a channel (mode {image.mode})")
    mode = "L" if Image.getmodebase(image.mode) == "L" else "RGB"
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            changes["with transparency, put on white"] += 1
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.atleast_3d(image if image.mode == mode else image.convert(mode)).transpose(2, 0, 1)


def crop_and_resize(image, size, channels, changes):
    """The central square of an image (C, H, W), resized to `size` if that is given, in grey or in colour."""
    C, H, W = image.shape
    if image.dtype != np.uint8 or (H == W and size in (None, H) and C == channels):
        return image
    side = min(H, W)
    changes["not square, cropped to their centre"] += H != W
    changes["smaller than asked for, enlarged"] += side < (size or 0)
    changes["grey, made colour as others are"] += C < channels
    top, left = (H - side) // 2, (W - side) // 2
    picture = to_picture(image[:, top:top + side, left:left + side]).convert("L" if channels == 1 else "RGB")
    picture = picture.resize((size, size), Image.Resampling.LANCZOS) if size else picture
    return np.atleast_3d(picture).transpose(2, 0, 1)


class Pictures:
    """Files of pictures or latents as a sequence of arrays (C, H, W), uint8 or float32. changes: see from_picture()."""

    def __init__(self, path, names, open_file, changes):
        self.path, self.names, self.open_file, self.changes = path, names, open_file, changes

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        name = self.names[i]
        with reading(f"{self.path}/{name}"), self.open_file(name) as file:
            content = BytesIO(file.read(2**30))                             # whatever a zip says of sizes
            if not name.lower().endswith(".npy"):
                return from_picture(Image.open(content), self.changes)
            latent = np.load(content, allow_pickle=False)
            if (latent.dtype != np.float32 or latent.ndim != 3 or len(latent) % 2 or not np.isfinite(latent).all()
                    or (latent[len(latent) // 2:] < 0).any()):              # as logarithms of variances are
                raise ValueError("must be float32 (2C, S, S), mean and standard deviation of a VAE's posterior")
            return latent


def labels_by_table(names, table, open_file, lines):
    """The value that the file `table`, a dataset.json [EDM], has for each file, or None if it has none at all."""
    with open_file(table) as file:
        pairs = json.loads(file.read(2**30))["labels"] or []
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    values = {f"{table.removesuffix('dataset.json')}{name}": value for name, value in pairs}
    if not values:
        lines.append("dataset.json has no labels")
        return None
    missing = [name for name in names if name not in values]
    if missing or len(values) < len(pairs):
        raise ValueError(f"has no label for {missing[0]}" if missing else "has two labels for one image")
    if len(values) > len(names):
        lines.append(f"dataset.json names images that are not there: {len(values) - len(names):,}")
    return [values[name] for name in names]


def label_pictures(images, table, lines):
    """Values of the labels of Pictures or None, and which are held out or None. Labels are those of the file `table`, a
    dataset.json, else the outermost folders that differ; folders train, val, test and the like there are splits."""
    levels = zip_longest(*(name.split("/")[:-1] for name in images.names), fillvalue="")     # a folder of each file
    levels, held_out = [level for level in levels if len(set(level)) > 1], None
    names = [{folder.lower() for folder in level} for level in levels]
    splits = [level & SPLITS for level in names]
    if any(splits):
        if any(splits[1:]) or names[0] - SPLITS or not names[0] - HELD_OUT:
            raise ValueError(f"has a folder {min(set().union(*splits))}: if it is a split, splits must be the outermost"
                             " folders, train among them, and no other folder; if it is a class, give it another name")
        lines.append(f"the folders {', '.join(sorted(set(levels[0])))} are splits: what is not train is held out")
        held_out = np.array([folder.lower() in HELD_OUT for folder in levels.pop(0)])
    if table:
        with reading(f"{images.path}/{table}"):
            return labels_by_table(images.names, table, images.open_file, lines), held_out
    if all(re.search(r"(^|/)[0-9]{5}/img[0-9]{8}\.[^/]*$", name) for name in images.names):
        lines.append("the folders are numbered as EDM does it, so they are no classes; there is no dataset.json")
        return None, held_out
    if levels and "" in levels[0]:
        stray = images.names[levels[0].index("")]
        raise ValueError(f"{stray} lies beside the folders of the classes; put it into one, or take it out")
    return levels[0] if levels else None, held_out


def open_source(path, changes):
    """The Source in a folder or file, by what it holds. changes: a Counter, see from_picture(). Raises UserError."""
    path, opened, lines = Path(path), set(), []
    with reading(path):
        every, open_any = open_files(path)

        def open_file(name):
            opened.add(name)
            return open_any(name)

        names = sorted(name for name in every if not HIDDEN.search(name))
        pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
        stems = {re.sub(r"(\.npy|\.gz)+$", "", name).replace(".idx", "-idx"): name
                 for name in sorted(set(names) - set(pictures), reverse=True)}
        found = [stem for stem in stems if IMAGE_STEMS.fullmatch(stem.split("/")[-1])]
        found.sort(key=lambda stem: stem.split("/")[::-1])                  # CIFAR's batches by their numbers
        latents = [name for name in names if name.lower().endswith(".npy") and not found]
        if "data_batch_1" in {stem.split("/")[-1] for stem in stems}:
            raise ValueError("holds pickles, which can run code; take the binary archive: python data.py cifar10")
        if pictures and (found or latents):
            other = f"an array of images, {found[0]}" if found else ".npy latents"
            raise ValueError(f"holds both pictures and {other}; take one of them out")
        if found:
            images, values, held_out = from_arrays(stems, found, open_file)
        elif not pictures and (not latents or path.suffix.lower() == ".npz"):
            raise ValueError(f"has arrays {', '.join(latents)[:200]}, but none called arr_0, images, x_train or "
                             "train_images" if latents else "it holds no images of a kind that this reads")
        elif path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("is a tar of pictures, which is slow to read in any order; unpack it")
        else:
            images = Pictures(path, pictures or latents, open_file, changes)
            table = next((name for name in names if name.split("/")[-1] == "dataset.json"), None)
            values, held_out = label_pictures(images, table, lines)
        labels, classes = (np.zeros(len(images), np.int64), []) if values is None else as_labels(values)
    left = set(names) - opened - set(pictures + latents)
    left = Counter(name if name.endswith(".npy") else os.path.splitext(name)[1] or name for name in left)
    left |= {"hidden": len(every) - len(names)}
    left = [f"{count:,} {ascii(kind)[1:-1]}" for kind, count in sorted(left.items()) if count]
    return Source(images, labels, classes, held_out, lines + [f"left out: {', '.join(left)[:300]}"] * bool(left))


DOWNLOADS = {                                                               # name: where from, {file: its SHA-256}
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"}),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", {
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"})}
FASHION = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def download(url, path, sha256):
    """Fetch a file unless there is one at `path`. It appears there whole.
    sha256: its hash, or the first digits of that; a file that is there already is not checked."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)                                        # torch.hub has no time-out of its own
        with reading(f"cannot download {url}; try again, or put the file at {path}"):
            torch.hub.download_url_to_file(url, str(path), sha256)


def write_images(files, source, made, changes, channels=1):
    """Write the images of a Source into two open files, those to train on and those held out. Returns their numbers.
    Unless the source itself holds images out, the hash of an image decides, so that its copies stay together."""
    changes.clear()
    first, numbers = None, ([], [])
    for file in files:
        file.seek(HEADER)                                                   # which is written last
        file.truncate()
    for i in progress(range(len(source.images)), "images prepared", len(source.images)):
        try:
            image = source.images[i]
        except UserError as error:
            if not made["skip_broken"]:
                raise UserError(f"{error}; --skip-broken leaves such images out") from None
            say(f"left out: {error}")
            changes["that cannot be read, left out"] += 1
            continue
        if made["size"] and image.dtype != np.uint8:
            raise UserError(f"--size: {made['source']} holds latents, which cannot be resized")
        if len(image) > channels:                                           # not grey after all: begin again
            return write_images(files, source, made, changes, len(image))
        image = np.ascontiguousarray(crop_and_resize(image, made["size"], channels, changes))
        first = image if first is None else first
        C, H, W = image.shape
        if image.shape != first.shape or H != W:
            raise UserError(f"{made['source']}: {source.images.names[i]} is {C}x{H}x{W}, the first is "
                            f"{'x'.join(map(str, first.shape))}: images must be square and of one size; --size makes "
                            "pictures so")
        share = int.from_bytes(hashlib.sha256(image).digest()[:8], "big") / 2**64
        held = share < made["holdout"] if source.held_out is None else bool(source.held_out[i])
        files[held].write(image)
        numbers[held].append(i)
    if not numbers[0]:
        raise UserError(f"{made['source']}: no image is left to train on")
    for file, part in zip(files, numbers):
        file.seek(0)
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (len(part), *first.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == HEADER
    return numbers


def channel_statistics(images):
    """Mean and standard deviation of all pixels, or of each channel of latents: float64 (1,) or (C,)."""
    halves = np.split(images, 2, axis=1) if images.dtype == np.float32 else [images.reshape(len(images), 1, -1, 1)]
    count = halves[0][:, 0].size
    mean = np.einsum("nchw->c", halves[0], dtype=float) / count
    square = sum(np.einsum("nchw,nchw->c", half, half, dtype=float) for half in halves) / count
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def make_grid(images, columns, names=()):
    """Images (N, C, S, S), uint8, as one Pillow image, small ones enlarged, the names of the rows at their left."""
    side = images.shape[-1] * max(1, 64 // images.shape[-1])
    cell, rows = side + 2, -(-len(images) // columns)
    font, names = ImageFont.load_default(12), [name[:16] for name in names]
    margin = 2 + max((10 + int(font.getlength(name)) for name in names), default=0)
    sheet = Image.new("L" if images.shape[1] == 1 else "RGB", (columns * cell + margin, rows * cell + 2), "#303030")
    for i, image in enumerate(images):
        picture = to_picture(image).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (i % columns * cell + margin, i // columns * cell + 2))
    for row, name in enumerate(names):
        ImageDraw.Draw(sheet).text((margin - 6, row * cell + cell // 2), name, "white", font, anchor="rm")
    return sheet


def contact_sheet(dataset):
    """Ten images of each of the first 16 classes, or 100 without labels; of latents, three channels of their means."""
    order, classes, C = epoch_order(len(dataset), 0, 0), dataset.facts["classes"][:16], dataset.shape[0]
    rows = [order[dataset.labels[order] == label][:10] for label in range(len(classes))]
    cells = []
    for row in rows or np.array_split(order[:100], 10):
        images = torch.from_numpy(dataset.images[row])
        if dataset.facts["latent"]:
            images = to_network(images[:, :C], dataset.facts).add(1).mul(127.5).clamp(0, 255)
        images = images[:, :1 if C < 3 else 3].float()
        images = torch.nn.functional.interpolate(images, min(dataset.shape[1], 128), mode="area")
        cells.append(torch.nn.functional.pad(images, (0,) * 7 + (10 - len(row),)))         # short rows end in black
    return make_grid(torch.cat(cells).to(torch.uint8), 10, classes)


def write_set(folder, source, made, changes):
    """Write a Source as a set into `folder`, prepared as `made` says; `changes` counts what was done to its images."""
    with (open(folder / "images.npy", "wb", 2**20) as train,                # large buffers: tiny images come fast
          open(folder / "holdout-images.npy", "wb", 2**20) as holdout):
        numbers = write_images((train, holdout), source, made, changes)
    pixels = hashlib.sha256()
    for part, prefix in zip(numbers, ("", "holdout-")):
        np.save(folder / f"{prefix}labels.npy", source.labels[part])
        images = np.load(folder / f"{prefix}images.npy", mmap_mode="r")
        pixels.update(str(images.shape).encode())                           # where the held-out part begins
        pixels.update(images)
    hashes = {"images": pixels, "labels": hashlib.sha256(source.labels[numbers[0] + numbers[1]]),
              "classes": hashlib.sha256(json.dumps(source.classes).encode())}
    counts = np.bincount(source.labels[numbers[0]], minlength=len(source.classes))
    if not counts.all():
        raise UserError(f"{made['source']}: no image of {source.classes[counts.argmin()]!r} is left to train on; "
                        "choose a lower --holdout")
    images = np.load(folder / "images.npy", mmap_mode="r")
    mean, std = channel_statistics(images)
    if not std.all():
        raise UserError(f"{made['source']}: all images are alike")
    facts = {"latent": images.dtype == np.float32, "mean": mean.tolist(), "std": std.tolist(),
             "classes": source.classes, "counts": counts.tolist(),
             "hashes": {name: sha.hexdigest() for name, sha in hashes.items()}}
    about = json.dumps({"format": FORMAT, "made": made, "facts": facts}, indent=1, ensure_ascii=False)
    (folder / "about.json").write_text(about, encoding="utf-8")
    contact_sheet(load_dataset(folder)).save(folder / "contact-sheet.png")


def main():
    parser = Parser(__doc__)
    parser.add_argument("source", help=f"{', '.join(DOWNLOADS)}, or the path of a folder or file")
    parser.add_argument("--name", help="the set goes to datasets/NAME (default: the source's name, and -SIZE)")
    parser.add_argument("--size", type=number(int, 1, 8192), help="crop images to their centre, resize to this side")
    parser.add_argument("--holdout", type=number(float, 0, 0.9), default=0.05,
                        help="share of the images to hold out, if the source has no test part (default: 0.05)")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace a set of that name")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)               # as Ctrl-C: no half-made set stays
    path, named, changes = Path(args.source), args.source in DOWNLOADS, Counter()
    if not named and not (args.source and path.exists()):
        hint = "a set of that name is ready" if find_set(args.source) else f"names to download: {', '.join(DOWNLOADS)}"
        raise UserError(f"{args.source}: there is no such file; {hint}")
    if named and path.exists():
        raise UserError(f"{args.source} is a set to fetch and also a path here; write ./{args.source} for the path")
    stem = re.sub(r"(\.(zip|npz|npy|tar|tgz|gz))+$", "", Path(os.path.abspath(path)).name, flags=re.IGNORECASE)
    name = args.name or (f"{stem}-{args.size}" if args.size else stem)
    if not re.fullmatch(r"\w[\w .+-]{0,99}", name) or name == "downloads":
        raise UserError(f"--name: {name[:60]!r} is not made of letters, digits and . + - _")
    folder = DATASETS / name
    made = {"source": args.source if named else os.path.abspath(path), "size": args.size, "holdout": args.holdout,
            "skip_broken": args.skip_broken}
    if folder.exists() and not (folder / "about.json").is_file():
        raise UserError(f"{folder} is there and is no set; choose another --name")
    if folder.exists() and not args.overwrite:
        with reading(folder):
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            other = differences(about.get("made", {}), made)
        if other:
            raise UserError(f"{folder} was made with {other}; choose another --name, or --overwrite")
        lines = [f"{folder} is ready; if its source has changed since, use --overwrite"]
    else:
        if named:
            base, files = DOWNLOADS[args.source]
            path = DATASETS / "downloads" / args.source
            for file, sha256 in files.items():
                download(base + file, path / file, sha256)
            path = path / file if len(files) == 1 else path
        source = open_source(path, changes)
        if args.source == "fashion-mnist":
            source = source._replace(classes=FASHION)
        with tempfile.TemporaryDirectory(dir=DATASETS, prefix=".making-") as making:
            making = Path(making) / name
            making.mkdir()
            write_set(making, source, made, changes)
            if folder.exists():
                folder.rename(making.with_name("before"))                   # which goes away with what is around it
            making.rename(folder)
        lines = source.lines + [f"images {what}: {count:,}" for what, count in changes.items() if count]
    dataset = load_dataset(folder)
    C, S, _ = dataset.shape
    mean, std = (", ".join(f"{value:.4g}" for value in dataset.facts[name]) for name in ("mean", "std"))
    print(describe(dataset.facts))
    print(f"held out: {len(dataset.holdout or ''):,}; {S}x{S}, channels: {C}, mean {mean}, standard deviation {std}")
    print(*lines, folder / "contact-sheet.png", sep="\n")


if __name__ == "__main__":
    run_main(main)
