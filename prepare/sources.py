"""Whatever images people have, by what it holds: folders, zips, idx, npz, npy, CIFAR's archives, latents. Each becomes
a Source. No diffusion here, and nothing that training reads: see prepare/sets.py."""

import gzip
import json
import math
import os
import re
import tarfile
import warnings
import zipfile
from collections import Counter, namedtuple
from io import BytesIO
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data import to_picture
from plumbing.command import reading, existing_file

warnings.filterwarnings("ignore", module="PIL")  # whatever matters is raised

# What open_source() finds. images: a sequence of arrays (C, H, W), uint8 or float32; labels: int64 (N,), zeros if there
# are no classes; held_out: bool (N,), or None if the source has no such part; lines: what its user should know.
Source = namedtuple("Source", ["images", "labels", "classes", "held_out", "lines"])
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX/|Thumbs\.db$)")
HELD_OUT = {"t10k", "test", "testing", "val", "valid", "validation"}  # names of parts and of their folders
SPLITS = HELD_OUT | {"train", "training"}
IMAGE_STEMS = re.compile(r"(?:.*[-_.])?images(?:[-.]idx3-ubyte)?|x_(?:train|val|test)|arr_0|"
                         r"(?:data_batch_\d|test_batch|train|test)\.bin")  # MNIST, MedMNIST, Keras, ADM; CIFAR
LABEL_NAMES = {"images": "labels", "idx3": "idx1", "x_": "y_", "arr_0": "arr_1"}  # what their labels are called


def labels_of(images):
    """The path of the labels that belong to an array or file of images; CIFAR has both in the same file."""
    return re.sub(r"(images|idx3|\bx_|arr_0)(?=[^/]*$)", lambda found: LABEL_NAMES[found[0]], images)


def open_files(path):
    """The files of a folder, zip, npz or tar: their names, and a function that opens one by its name. A single file
    counts as a folder of itself and the labels beside it. Why: all other code then sees only names and bytes."""
    if path.is_dir():
        names, seen, folders, links = [], set(), [""], []
        while folders or links:  # links last: a class keeps its real name
            folder = (folders or links).pop()
            if os.path.realpath(path / folder) in seen:
                continue
            seen.add(os.path.realpath(path / folder))
            for entry in sorted(os.scandir(path / folder), key=lambda entry: entry.name, reverse=True):
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(f"{folder}{entry.name}/")
                else:
                    names.append(folder + entry.name)
        return names, lambda name: open(existing_file(path / name), "rb")
    if zipfile.is_zipfile(existing_file(path)):
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
            size = 3073 if "batch" in name else 3074  # CIFAR-100 has a coarse label before
            records = np.frombuffer(file.read(2**28), np.uint8).reshape(-1, size)
            return records[:, -3073] if field == "labels" else records[:, -3072:].reshape(-1, 3, 32, 32)
        if len(head) < 4 or head[:3] != b"\0\0\x08":
            raise ValueError(f"{name} is neither .npy nor an idx file of bytes")
        sizes = np.frombuffer(file.read(4 + 4 * head[3]), ">u4")[1:].tolist()
        return np.frombuffer(file.read(math.prod(sizes)), np.uint8).reshape(sizes)


def as_images(array):
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W). Raises ValueError for what is not that."""
    shaped = array[..., None] if array.ndim == 3 else array  # (N, H, W, 1)
    shaped = shaped.transpose(0, 3, 1, 2) if shaped.ndim == 4 and shaped.shape[3] in (1, 3) else shaped
    if array.dtype != np.uint8 or shaped.ndim != 4 or shaped.shape[1] not in (1, 3) or not array.size:
        raise ValueError(f"holds {array.dtype} {array.shape}; images are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) "
                         "with C 1 or 3; of values from 0 to 1 save (images * 255).round().astype('uint8')")
    return shaped


def as_labels(values):
    """Labels 0, 1, ... and names of classes, in natural order: 2 before 10. values: whole numbers, texts or one-hot."""
    values = np.asarray(values)
    values = values.ravel() if values.size == len(values) else values  # MedMNIST's are (N, 1)
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
        if name.endswith(("batches.meta.txt", "fine_label_names.txt")):  # CIFAR's class names
            with open_file(name) as file:
                values = np.array(file.read(2**20).decode().split())[values]
    held_out = np.repeat(held, [len(array) for array in images]) if any(held) else None
    return np.concatenate(images) if len(images) > 1 else images[0], values, held_out


def from_picture(image, changes):
    """A Pillow image as uint8 (1 or 3, H, W). changes: counts the losses that are accepted; others raise ValueError."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a phone's photo with a second
        raise ValueError(f"is animated, {image.n_frames} frames")
    image.load()
    if image.info or image.format == "TIFF":  # where an orientation would be
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
            content = BytesIO(file.read(2**30))  # whatever a zip says of sizes
            if not name.lower().endswith(".npy"):
                return from_picture(Image.open(content), self.changes)
            latent = np.load(content, allow_pickle=False)
            if (latent.dtype != np.float32 or latent.ndim != 3 or len(latent) % 2 or not np.isfinite(latent).all()
                    or (latent[len(latent) // 2:] < 0).any()):  # as logarithms of variances are
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
    levels = zip_longest(*(name.split("/")[:-1] for name in images.names), fillvalue="")  # a folder of each file
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
        found.sort(key=lambda stem: stem.split("/")[::-1])  # CIFAR's batches by their numbers
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
