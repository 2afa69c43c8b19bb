"""Any source of images prepared once: `python data.py SOURCE` runs this and writes datasets/NAME/.

    python data.py fashion-mnist            # fetched by name: mnist, fashion-mnist, cifar10, cifar100
    python data.py ~/pictures --size=64     # a folder or zip of images or latents, or an npz or npy of images

What a set is made of stands in data.py, how sources are read in prepare/sources.py.
"""

import hashlib
import json
import os
import re
import signal
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import data
from data import FORMAT, describe, epoch_order, find_set, load_dataset, make_grid, to_network
from plumbing.command import Parser, UserError, between, differences, reading, track, warn
from prepare.pictures import crop_and_resize
from prepare.public import DOWNLOADS, open_public
from prepare.sources import Pictures, open_source

HEADER = 128  # bytes of a .npy file before its values


def read_images(source, made, changes):
    """Yield the numbers and the images of a Source, without those that are left out."""
    for i in track(range(len(source.images)), "images prepared", len(source.images)):
        if source.labels[i] < 0:
            continue
        try:
            image = source.images[i]
        except UserError as error:
            if not made["skip_broken"]:
                raise UserError(f"{error}; --skip-broken leaves such images out") from None
            warn(f"left out: {error}")
            changes["that cannot be read, left out"] += 1
            continue
        if made["size"] and image.dtype != np.uint8:
            raise UserError(f"--size: {made['source']} holds latents, which cannot be resized")
        yield i, image


def write_images(files, source, made, changes, channels=1):
    """Write the images of a Source into two open files, those to train on and those held out. Returns their numbers.
    When the first colour image turns up, it begins again with three channels.

    Held out is what the source says, else images by their hashes, so that copies of one stay together; but of each
    class one image at least stays in training."""
    changes.clear()
    first, numbers = None, ([], [])
    trained, waiting = set(), Counter(source.labels.tolist())  # classes that have an image to train on; images to come
    for file in files:
        file.seek(HEADER)  # which is written last
        file.truncate()
    for i, image in read_images(source, made, changes):
        if len(image) > channels:
            return write_images(files, source, made, changes, len(image))
        image = np.ascontiguousarray(crop_and_resize(image, made["size"], channels, changes))
        first = image if first is None else first
        C, H, W = image.shape
        if image.shape != first.shape or H != W:
            raise UserError(f"{made['source']}: {source.images.names[i]} is {C}x{H}x{W}, the first is "
                            f"{'x'.join(map(str, first.shape))}: images must be square and of one size; --size makes "
                            "pictures so")
        label = source.labels[i]
        waiting[label] -= 1
        if source.held_out is not None:
            held = bool(source.held_out[i])
        else:
            share = int.from_bytes(hashlib.sha256(image).digest()[:8], "big") / 2**64
            held = share < made["holdout"] and (label in trained or waiting[label] > 0)
        if not held:
            trained.add(label)
        files[held].write(image)
        numbers[held].append(i)
    if not numbers[0]:
        raise UserError(f"{made['source']}: no image is left to train on")
    for file, part in zip(files, numbers):
        file.seek(0)
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (len(part), *first.shape)}
        np.lib.format.write_array_header_1_0(file, header)
    return numbers


def mask_lines(source):
    """A line about pictures that are like segmentation masks, of at most 32 colours among others of more. Why: masks
    that lie beside the pictures would be trained on."""
    flat = Counter(source.labels[sorted(source.images.flat)].tolist())
    counts = Counter(source.labels[source.labels >= 0].tolist())
    odd = [name for label, name in enumerate(source.classes) if flat[label] == counts[label]]
    if not 0 < flat.total() < counts.total() or (source.classes and not odd):
        return []
    which = f", all of {', '.join(odd)[:200]} among them," if odd else ""
    return [f"{flat.total():,} of {counts.total():,} images{which} have at most 32 colours, as masks do; if they are "
            "masks, take them out"]


def channel_statistics(images):
    """Mean and standard deviation of all pixels, or of each channel of latents: float64 (1,) or (C,)."""
    halves = np.split(images, 2, axis=1) if images.dtype == np.float32 else [images.reshape(len(images), 1, -1, 1)]
    count = halves[0][:, 0].size
    mean = np.einsum("nchw->c", halves[0], dtype=float) / count
    square = sum(np.einsum("nchw,nchw->c", half, half, dtype=float) for half in halves) / count
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


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
        cells.append(torch.nn.functional.pad(images, (0,) * 7 + (10 - len(row),)))  # short rows end in black
    return make_grid(torch.cat(cells).to(torch.uint8), 10, classes)


def write_set(folder, source, made, changes):
    """Write a Source as a set into `folder`, prepared as `made` says; `changes` counts what was done to its images."""
    with (open(folder / "images.npy", "wb", 2**20) as train,  # large buffers: tiny images come fast
          open(folder / "holdout-images.npy", "wb", 2**20) as holdout):
        numbers = write_images((train, holdout), source, made, changes)
    pixels = hashlib.sha256()
    for part, prefix in zip(numbers, ("", "holdout-")):
        np.save(folder / f"{prefix}labels.npy", source.labels[part])
        images = np.load(folder / f"{prefix}images.npy", mmap_mode="r")
        pixels.update(str(images.shape).encode())  # where the held-out part begins
        pixels.update(images)
    hashes = {"images": pixels, "labels": hashlib.sha256(source.labels[numbers[0] + numbers[1]]),
              "classes": hashlib.sha256(json.dumps(source.classes).encode())}
    counts = np.bincount(source.labels[numbers[0]], minlength=len(source.classes))
    if not counts.all():
        raise UserError(f"{made['source']}: no image of {source.classes[counts.argmin()]!r} is left to train on: "
                        "all of them are held out by the source, or cannot be read")
    images = np.load(folder / "images.npy", mmap_mode="r")
    mean, std = channel_statistics(images)
    if not std.all():
        which = f"channel {std.argmin()} is the same in all latents" if len(std) > 1 else "all images are alike"
        raise UserError(f"{made['source']}: {which}")
    facts = {"latent": images.dtype == np.float32, "mean": mean.tolist(), "std": std.tolist(),
             "classes": source.classes, "counts": counts.tolist(),
             "hashes": {name: sha.hexdigest() for name, sha in hashes.items()}}
    about = json.dumps({"format": FORMAT, "made": made, "facts": facts}, indent=1, ensure_ascii=False)
    (folder / "about.json").write_text(about, encoding="utf-8")
    contact_sheet(load_dataset(folder)).save(folder / "contact-sheet.png")


def make_parser():
    parser = Parser(__doc__)
    parser.add_argument("source", type=os.path.expanduser,
                        help=f"{', '.join(DOWNLOADS)}, or the path of a folder or file")
    parser.add_argument("--name", help="the set goes to datasets/NAME (default: the source's name, and -SIZE)")
    parser.add_argument("--size", type=between(int, 1, 8192), help="crop images to their centre, resize to this side")
    parser.add_argument("--holdout", type=between(float, 0, 0.9), default=0.05,
                        help="share of the images to hold out, if the source has no test part (default: 0.05)")
    parser.add_argument("--labels", default="", type=os.path.expanduser, metavar="FILE[:COLUMN]",
                        help="a CSV or text file with a row for each picture, its name and its label; or none, to take "
                             "the images without labels (default: dataset.json, else folders)")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace a set of that name")
    return parser


def choose_folder(args):
    """The directory that the set goes to. Raises UserError where the source or the name is wrong."""
    path, named = Path(args.source), args.source in DOWNLOADS
    if not named and not (args.source and path.exists()):
        hint = "a set of that name is ready" if find_set(args.source) else f"names to download: {', '.join(DOWNLOADS)}"
        raise UserError(f"{args.source}: there is no such file; {hint}")
    if named and path.exists():
        raise UserError(f"{args.source} is a set to fetch and also a path here; write ./{args.source} for the path")
    stem = re.sub(r"\.(zip|npz|npy)$", "", Path(os.path.abspath(path)).name, flags=re.IGNORECASE)
    name = args.name or (f"{stem}-{args.size}" if args.size else stem)
    if not re.fullmatch(r"\w[\w .+-]{0,99}", name) or name == "downloads":
        raise UserError(f"--name: {name[:60]!r} is not made of letters, digits and . + - _")
    folder = data.DATASETS / name
    if folder.exists() and not (folder / "about.json").is_file():
        raise UserError(f"{folder} is there and is no set; choose another --name")
    return folder


def prepare(folder, source, made, labels=""):
    """Write the Source in a file, a folder or a public set into `folder`, whole or not at all. Returns lines that its
    user should know."""
    changes = Counter()
    if source in DOWNLOADS:
        found = open_public(source, labels)
    else:
        found = open_source(source, changes, labels, made["size"])
    pictures = isinstance(found.images, Pictures)
    if labels not in ("", "none") and not pictures:
        raise UserError(f"--labels=FILE goes with pictures; {source} has its labels in itself")
    with tempfile.TemporaryDirectory(dir=data.DATASETS, prefix=".making-") as making:
        making = Path(making) / folder.name
        making.mkdir()
        write_set(making, found, made, changes)
        if folder.exists():
            folder.rename(making.with_name("before"))  # which goes away with what is around it
        making.rename(folder)
    lines = found.lines + (mask_lines(found) if pictures else [])
    return lines + [f"images {what}: {count:,}" for what, count in changes.items() if count]


def main():
    args = make_parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no half-made set stays
    folder = choose_folder(args)
    source = args.source if args.source in DOWNLOADS else os.path.abspath(args.source)
    made = {"source": source, "size": args.size, "holdout": args.holdout, "skip_broken": args.skip_broken}
    if args.labels:
        made["labels"] = args.labels if args.labels == "none" else os.path.abspath(args.labels)
    if folder.exists() and not args.overwrite:
        with reading(folder):
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            other = differences(about.get("made", {}), made)
        if other:
            raise UserError(f"{folder} was made with {other}; choose another --name, or --overwrite")
        lines = [f"{folder} is ready; if its source has changed since, use --overwrite"]
    else:
        lines = prepare(folder, args.source, made, args.labels)
    dataset = load_dataset(folder)
    C, S, _ = dataset.shape
    mean, std = (", ".join(f"{value:.4g}" for value in dataset.facts[name]) for name in ("mean", "std"))
    print(describe(dataset.facts))
    print(f"held out: {len(dataset.holdout or ''):,}; {S}x{S}, channels: {C}, mean {mean}, standard deviation {std}")
    print(*lines, folder / "contact-sheet.png", sep="\n")
