"""Whatever images people have, by what it holds: folders and zips of pictures or latents, npz, npy. Each becomes a
Source. Nothing here is about diffusion, and training reads none of it: see prepare/sets.py."""

import os
import re
import zipfile
from collections import Counter, namedtuple
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from plumbing.command import existing_file, reading, warn
from prepare.labels import (LITTER, SPLIT_WORDS, SUFFIXES, as_labels, classes_by_folder, labels_by_json,
                            labels_by_table, splits_by_folder)
from prepare.pictures import from_picture

# What open_source() finds. images: a sequence of arrays (C, H, W), uint8 or float32; labels: int64 (N,), zeros if there
# are no classes, -1 for what is left out; held_out: bool (N,), or None if the source has no such part; lines: what its
# user should know.
Source = namedtuple("Source", ["images", "labels", "classes", "held_out", "lines"])
ARRAY = re.compile(r"((?:.*[-_./ ])?)(x|images?|arr_0|y|labels?|targets?|arr_1)"
                   rf"((?:[-_](?:{'|'.join(SPLIT_WORDS)}))?)\.npy")


def array_role(name):
    """What an array holds by its path, "images" or "labels", and of which part: train/x.npy, y_test.npy and
    train_labels.npy are such names; None for others."""
    found = ARRAY.fullmatch(name.lower())
    if not found:
        return None
    before, word, after = found.groups()
    return "images" if word in ("x", "image", "images", "arr_0") else "labels", f"{before}{after}"


def names_in_zip(entries):
    """The names of a zip's entries. Python reads those without UTF-8's flag as code page 437; that is right for the
    oldest programs, and wrong for those that wrote UTF-8 without the flag or a code page of their own language."""
    def names(encoding):
        return [entry.filename if entry.flag_bits & 0x800 else entry.orig_filename.encode("cp437").decode(encoding)
                for entry in entries]

    try:
        return names("utf-8")
    except UnicodeDecodeError:
        warn("the zip's names are neither ASCII nor UTF-8 and were read as code page 437; if they look wrong, unpack "
             "it where they look right (unzip -O cp932, for Japanese) and prepare the folder")
        return names("cp437")


def open_files(path):
    """The files of a folder, zip or npz: their names, and a function that opens one by its name. A .npy file is like a
    folder of images.npy and, if labels lie beside it, labels.npy. Why: all other code sees only names and bytes."""
    if path.is_dir():
        return names_in_folder(path), lambda name: open(existing_file(f"{path}/{name}"), "rb")
    if not zipfile.is_zipfile(existing_file(path)):
        files = with_labels_beside(path)
        return list(files), lambda name: open(files[name], "rb")
    archive = zipfile.ZipFile(path)
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    names = [re.sub(r"^(\.?/)+", "", name.replace("\\", "/")) for name in names_in_zip(entries)]
    files = dict(zip(names, entries))
    if len(files) < len(names):
        raise ValueError("holds several files of the same name")
    return names, lambda name: archive.open(files[name])


def names_in_folder(path):
    """The paths of all files in a folder. Links are followed once, and last, so that a class keeps its real name."""
    names, seen, folders, links = [], set(), [""], []
    while folders or links:
        folder = (folders or links).pop()
        place = os.path.realpath(path / folder)
        if place in seen:
            continue
        seen.add(place)
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name, reverse=True):
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(f"{folder}{entry.name}/")
            else:
                names.append(folder + entry.name)
    return names


def with_labels_beside(path):
    """The path of a .npy file of images, and of the labels beside it if there are some, by names for them."""
    if path.suffix.lower() != ".npy":
        return {path.name: path}
    kind, part = array_role(path.name) or ("", "")
    beside = [file for file in path.parent.iterdir() if kind == "images" and array_role(file.name) == ("labels", part)]
    return dict(zip(("images.npy", "labels.npy"), [path, *beside]))


def read_array(open_file, name):
    """The array in a .npy file."""
    with open_file(name) as file:
        return np.load(file, allow_pickle=False)


def as_images(array):
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W). Raises ValueError for what is not that."""
    shaped = array[..., None] if array.ndim == 3 else array  # (N, H, W, 1)
    shaped = shaped.transpose(0, 3, 1, 2) if shaped.ndim == 4 and shaped.shape[3] in (1, 3) else shaped
    if array.dtype != np.uint8 or shaped.ndim != 4 or shaped.shape[1] not in (1, 3) or not array.size:
        raise ValueError(f"holds {array.dtype} {array.shape}; images are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) "
                         "with C 1 or 3; of values from 0 to 1 save (images * 255).round().astype('uint8')")
    return shaped


def from_arrays(roles, open_file, labels):
    """Images, the values of their labels or None, and which images are held out or None, read from arrays.
    roles: {what array_role() says: path}; labels: "" for those beside the images, else they have none."""
    parts = sorted(part for kind, part in roles if kind == "images")
    held = [len(parts) > 1 and any(SPLIT_WORDS.get(word) for word in re.findall("[a-z]+", part)) for part in parts]
    if held.count(False) != 1:
        which = ", ".join(roles["images", part] for part in parts)
        raise ValueError(f"holds several sets of images, {which[:200]}; choose the file of one")
    images = [as_images(read_array(open_file, roles["images", part])) for part in parts]
    beside = [] if labels else [roles.get(("labels", part)) for part in parts]
    if any(beside) and not all(beside):
        raise ValueError("has labels for some of its images only")
    values = [read_array(open_file, name) for name in filter(None, beside)]
    for name, some, array in zip(beside, values, images):
        if len(some) != len(array):
            raise ValueError(f"{name} has {len(some):,} labels for {len(array):,} images")
    held_out = np.repeat(held, [len(array) for array in images]) if any(held) else None
    images = np.concatenate(images) if len(images) > 1 else images[0]  # which may be large
    return images, np.concatenate(values) if values else None, held_out


def read_latents(file):
    """Latents as (2C, S, S), mean and standard deviation of a VAE's posterior. Raises ValueError for others."""
    latents = np.load(file, allow_pickle=False)
    if (latents.dtype != np.float32 or latents.ndim != 3 or len(latents) % 2 or not np.isfinite(latents).all()
            or (latents[len(latents) // 2:] < 0).any()):  # as logarithms of variances are
        raise ValueError("must be float32 (2C, S, S), mean and standard deviation of a VAE's posterior")
    return latents


def read_bytes(file):
    """The bytes of a file, of at most a gigabyte, whatever a zip says of sizes. Why in parts: who asks for a gigabyte
    at once pays for the room, a fifth of the time that small pictures take."""
    parts, left = [], 2**30
    while left and (part := file.read(min(left, 2**16))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


class Pictures:
    """Files of pictures or latents as a sequence of arrays (C, S, S), uint8 or float32. changes, size: see
    from_picture(). flat: the places of pictures that were read and have at most 32 colours, as masks do."""

    def __init__(self, path, names, open_file, changes, size):
        self.path, self.names, self.open_file, self.changes, self.size = path, names, open_file, changes, size
        self.flat = set()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        name = self.names[i]
        with reading(f"{self.path}/{name}"), self.open_file(name) as file:
            content = BytesIO(read_bytes(file))
            if name.lower().endswith(".npy"):
                return read_latents(content)
            image = Image.open(content)
            array = from_picture(image, self.changes, self.size)
            if not image.mode.startswith("I;16") and image.getcolors(32):
                self.flat.add(i)
            return array


def read_labels(path, pictures, names, open_file, labels, lines):
    """The values of the labels of pictures or None, and which are held out or None. names: of all files; labels: see
    open_source()."""
    held_out, levels = splits_by_folder(pictures, lines)
    tables = [name for name in names if name.split("/")[-1] == "dataset.json"]
    if labels == "none":
        return None, held_out
    if labels:
        file, _, column = (labels, "", "") if Path(labels).is_file() else labels.partition(":")
        with reading(f"--labels={file}"):
            return labels_by_table(pictures, existing_file(file).read_text("utf-8-sig"), column, lines), held_out
    if tables:
        with reading(f"{path}/{tables[0]}"), open_file(tables[0]) as file:
            return labels_by_json(pictures, tables[0], read_bytes(file), lines), held_out
    return classes_by_folder(pictures, held_out, levels, lines), held_out


def say_left_out(names, litter, classes, lines):
    """Note what was left out: files by kind, and how many were litter."""
    tables = sorted(name for name in names if name.lower().endswith((".csv", ".tsv", ".txt")))
    if tables and not classes:
        lines.append(f"no labels were found; if {tables[0]} holds some, take --labels=FILE")
    kinds = Counter(name if name.endswith(".npy") else os.path.splitext(name)[1] or name for name in names)
    kinds["hidden or of a system"] = litter
    kinds = [f"{count:,} {ascii(kind)[1:-1]}" for kind, count in sorted(kinds.items()) if count]
    if kinds:
        lines.append(f"left out: {', '.join(kinds)[:300]}")


def open_source(path, changes, labels="", size=None):
    """The Source in a folder or file, by what it holds. Raises UserError.

    changes, size: see from_picture(). labels: "none" for images without labels, a table FILE or FILE:COLUMN, or "" for
    labels as they lie with the images: in a dataset.json, else by folder."""
    path, lines = Path(path), []
    with reading(path):
        every, open_file = open_files(path)
        names = sorted(name for name in every if not LITTER.search(name))
        pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
        npy = [name for name in names if name.lower().endswith(".npy")]
        roles = {array_role(name): name for name in npy if array_role(name)}
        arrays = [name for (_, part), name in roles.items() if ("images", part) in roles]
        latents = [name for name in npy if not array_role(name)]
        if pictures and (arrays or latents):
            raise ValueError(f"holds both pictures and arrays, {(arrays or latents)[0]}; take one kind out")
        if arrays:
            used = arrays
            images, values, held_out = from_arrays(roles, open_file, labels)
        elif pictures or (latents and path.suffix.lower() != ".npz"):
            used = pictures or latents
            images = Pictures(path, used, open_file, changes, size)
            values, held_out = read_labels(path, used, names, open_file, labels, lines)
        elif latents:
            raise ValueError(f"has arrays {', '.join(latents)[:200]}, but none called arr_0, images, x_train or "
                             "train_images")
        else:
            raise ValueError("it holds no images of a kind that this reads; unpack archives other than zip")
        numbers, classes = np.zeros(len(images), np.int64), []
        if values is not None:
            numbers, classes = as_labels(values, held_out, lines)
        if held_out is not None and not held_out[numbers >= 0].any():
            held_out = None
    table = os.path.relpath(labels.partition(":")[0] or path, path)
    left = {name for name in names if not name.endswith("dataset.json")} - {*used, table}
    say_left_out(left, len(every) - len(names), classes, lines)
    return Source(images, numbers, classes, held_out, lines)
