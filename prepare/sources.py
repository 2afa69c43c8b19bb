"""Whatever images people have, by what it holds: folders, zips, idx, npz, npy, CIFAR's archives, latents. Each becomes
a Source. Nothing here is about diffusion, and training reads none of it: see prepare/sets.py."""

import gzip
import math
import os
import re
import tarfile
import zipfile
from collections import Counter, namedtuple
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from plumbing.command import existing_file, reading
from prepare.labels import (SPLIT_WORDS, SUFFIXES, as_labels, classes_by_folder, is_litter, labels_by_json,
                            labels_by_table, splits_by_folder)
from prepare.pictures import from_picture

# What open_source() finds. images: a sequence of arrays (C, H, W), uint8 or float32; labels: int64 (N,), zeros if there
# are no classes; held_out: bool (N,), or None if the source has no such part; lines: what its user should know.
Source = namedtuple("Source", ["images", "labels", "classes", "held_out", "lines"])
IMAGE_STEMS = re.compile(r"(?:.*[-_.])?images(?:[-.]idx3-ubyte)?|x|image|(?:x|image)[-_](?:train|val|valid|test)|"
                         r"(?:train|val|valid|test)[-_](?:x|image)|arr_0|"
                         r"(?:data_batch_\d|test_batch|train|test)\.bin", re.IGNORECASE)  # the last are CIFAR's
LABEL_NAMES = {"images": ("labels", "targets", "target"), "idx3": ("idx1",), "image": ("label", "target"), "x": ("y",),
               "arr_0": ("arr_1",)}  # what the labels of images are called


def labels_of(images):
    """Paths that the labels of an array or file of images may have, in lower case; CIFAR has both in one file."""
    if images.endswith(".bin"):
        yield images.lower()
    folder, _, stem = images.lower().rpartition("/")
    for word, others in LABEL_NAMES.items():
        for other in others:
            name = re.sub(rf"(?<![a-z]){word}(?![a-z])", other, stem)
            if word == "images":
                name = name.replace("idx3", "idx1")
            if name != stem:
                yield f"{folder}/{name}".lstrip("/")
    for other in ("labels", "targets"):
        yield f"{folder}/{other}".lstrip("/")


def decoded_name(entry, lines):
    """The name of a zip's entry. Python reads what has no UTF-8 flag as code page 437; that is right for the oldest
    programs, and wrong for those that wrote UTF-8 without the flag or a code page of their own language."""
    if entry.flag_bits & 0x800 or entry.filename.isascii():
        return entry.filename
    raw = entry.orig_filename.encode("cp437")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        line = ("names are neither ASCII nor UTF-8 and were read as code page 437; if they look wrong, unpack the zip "
                "where they look right (unzip -O cp932, for Japanese) and prepare the folder")
        if line not in lines:
            lines.append(line)
        return raw.decode("cp437")


class Files:
    """The files of a folder, zip, npz or tar: their names, and a call opens one by its name. A single file counts as a
    folder of itself and the labels beside it. Why: all other code then sees only names and bytes.

    opened: the names of those that were opened. lines: gets what their owner should know."""

    def __init__(self, path, lines):
        self.opened = set()
        if path.is_dir():
            self.names, self.open = names_in_folder(path), lambda name: open(existing_file(path / name), "rb")
            return
        if zipfile.is_zipfile(existing_file(path)):
            archive = zipfile.ZipFile(path)
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            pairs, opener = [(decoded_name(entry, lines), entry) for entry in entries], archive.open
        elif tarfile.is_tarfile(path):
            archive = tarfile.open(path)
            pairs, opener = [(member.name, member) for member in archive if not member.isdir()], archive.extractfile
        else:
            pairs, opener = with_labels_beside(path), lambda file: open(file, "rb")
        files = {re.sub(r"^(\.?/)+", "", name.replace("\\", "/")): file for name, file in pairs}
        if len(files) < len(pairs):
            raise ValueError("holds several files of the same name")
        self.names, self.open = list(files), lambda name: opener(files[name])

    def __call__(self, name):
        self.opened.add(name)
        return self.open(name)


def names_in_folder(path):
    """The paths of all files in a folder. Links are followed once, and last, so that a class keeps its real name."""
    names, seen, folders, links = [], set(), [""], []
    while folders or links:
        folder = (folders or links).pop()
        if os.path.realpath(path / folder) in seen:
            continue
        seen.add(os.path.realpath(path / folder))
        for entry in sorted(os.scandir(path / folder), key=lambda entry: entry.name, reverse=True):
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(f"{folder}{entry.name}/")
            else:
                names.append(folder + entry.name)
    return names


def with_labels_beside(path):
    """A file of images, and the file of their labels if it lies beside it: [(name, path)]."""
    stem = re.sub(r"(\.npy|\.gz)+$", "", path.name)
    if not IMAGE_STEMS.fullmatch(stem.replace(".idx", "-idx")):
        return [("images", path)]
    others = {re.sub(r"(\.npy|\.gz)+$", "", file.name).lower(): file for file in sorted(path.parent.iterdir())}
    beside = [others[name] for name in labels_of(stem) if name in others]
    return [("images", path), *(("labels", file) for file in beside[:1])]


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


def from_arrays(stems, found, open_file):
    """Images, the values of their labels or None, and which images are held out or None, read from arrays.
    stems: {path without suffix: path} of all files; found: those stems that hold images, whose labels lie beside."""
    words = [re.split("[-_./]", stem.lower().replace("t10k", "test")) for stem in found]
    held = [len(found) > 1 and any(SPLIT_WORDS.get(word) for word in some) for some in words]
    if len({"data_batch" in stem or stem for stem, out in zip(found, held) if not out}) != 1:
        raise ValueError(f"holds several sets of images, {', '.join(found)[:200]}; choose the file of one")
    images, values, lower = [], [], {stem.lower(): name for stem, name in stems.items()}
    for stem in found:
        beside = next((lower[name] for name in labels_of(stem) if name in lower), None)
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


def read_labels(path, names, open_file, labels, lines):
    """Pictures as training takes them: their names, the values of their labels or None, and which are held out or None.
    labels: see open_source()."""
    held_out, levels = splits_by_folder(names, lines)
    tables = [name for name in open_file.names if name.split("/")[-1] == "dataset.json"]
    if labels == "none":
        values = None
    elif labels:
        file, _, column = (labels, "", "") if Path(labels).is_file() else labels.partition(":")
        with reading(f"--labels={file}"):
            values = labels_by_table(names, existing_file(file).read_text("utf-8-sig"), column, lines)
    elif tables:
        with reading(f"{path}/{tables[0]}"), open_file(tables[0]) as file:
            values = labels_by_json(names, tables[0], file.read(2**30), lines)
    else:
        values = classes_by_folder(names, held_out, levels, lines)
    if values is not None and None in values:
        kept = [i for i, value in enumerate(values) if value is not None]
        names, values = [names[i] for i in kept], [values[i] for i in kept]
        held_out = held_out[kept] if held_out[kept].any() else None
    return names, values, held_out


def open_source(path, changes, labels=""):
    """The Source in a folder or file, by what it holds. Raises UserError.

    changes: a Counter, see from_picture(). labels: "none" for images without labels, a table FILE or FILE:COLUMN, or ""
    for labels as they lie with the images: in a dataset.json, else by folder."""
    path, lines = Path(path), []
    with reading(path):
        open_file = Files(path, lines)
        every = list(open_file.names)
        names = sorted(name for name in every if not is_litter(name))
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
            if labels not in ("", "none"):
                raise ValueError("--labels=FILE goes with pictures; the labels of an array lie beside it")
            values = None if labels else values
        elif not pictures and (not latents or path.suffix.lower() == ".npz"):
            raise ValueError(f"has arrays {', '.join(latents)[:200]}, but none called arr_0, images, x_train or "
                             "train_images" if latents else "it holds no images of a kind that this reads")
        elif path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("is a tar of pictures, which is slow to read in any order; unpack it")
        else:
            kept, values, held_out = read_labels(path, pictures or latents, open_file, labels, lines)
            images = Pictures(path, kept, open_file, changes)
        labels, classes = (np.zeros(len(images), np.int64), []) if values is None else as_labels(values)
    left = set(names) - open_file.opened - set(pictures + latents)
    tables = sorted(name for name in left if name.lower().endswith((".csv", ".tsv", ".txt")))
    if tables and not classes:
        lines.append(f"no labels were found; if {tables[0]} holds some, take --labels=FILE")
    left = Counter(name if name.endswith(".npy") else os.path.splitext(name)[1] or name for name in left)
    left |= {"hidden or of a system": len(every) - len(names)}
    left = [f"{count:,} {ascii(kind)[1:-1]}" for kind, count in sorted(left.items()) if count]
    return Source(images, labels, classes, held_out, lines + [f"left out: {', '.join(left)[:300]}"] * bool(left))
