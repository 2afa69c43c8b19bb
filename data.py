"""Sets of images as training reads them: arrays mapped from disk, in an order that depends on the
seed alone.

`python data.py SOURCE` prepares a set, once, from whatever images you have (prepare/sets.py). A set
is a directory datasets/NAME/ with

    images.npy           uint8 (N, C, S, S); for latents float32 (N, 2C, S, S), mean and standard
                         deviation of a VAE's posterior [EDM2]
    labels.npy           int64 (N,)
    holdout-images.npy   the held-out part, which training never sees, and holdout-labels.npy
    about.json           class names, statistics and hashes
    contact-sheet.png    what the model will see

Source: [EDM2] Karras et al. 2024, arXiv 2312.02696. Read this file after sample.py.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from model import Denoiser
from plumbing.command import UserError, existing_file, reading, run_main

DATASETS = Path(__file__).parent / "datasets"
FORMAT = 2  # of a prepared set; 1 held nothing out
PUBLIC_SETS = ("mnist", "fashion-mnist", "cifar10", "cifar100")  # that prepare/ fetches by name


@dataclass
class Dataset:
    """A prepared set, its arrays mapped from disk."""

    images: np.ndarray  # (N, C, S, S), of latents (N, 2C, S, S)
    labels: np.ndarray  # (N,)
    facts: dict  # latent, mean, std, classes, counts, hashes
    holdout: "Dataset | None" = None  # the held-out part, with the same facts

    def __len__(self):
        return len(self.images)

    @property
    def shape(self):
        """(C, S, S) as the network sees it."""
        _, channels, *sides = self.images.shape
        return (channels // 2 if self.facts["latent"] else channels, *sides)

    def feed(self, index_lists, device):
        """Yield [images, labels] on `device` for each array of indices.
        Why a thread: it reads the next two batches during a step."""
        def read(indices):
            tensors = [torch.from_numpy(array[indices]) for array in (self.images, self.labels)]
            if device.type == "cuda":
                tensors = [tensor.pin_memory() for tensor in tensors]
            return tensors

        index_lists = iter(index_lists)
        with ThreadPoolExecutor(1) as reader:
            waiting = [reader.submit(read, indices) for indices in islice(index_lists, 2)]
            while waiting:
                tensors = waiting.pop(0).result()
                waiting += [reader.submit(read, indices) for indices in islice(index_lists, 1)]
                yield [tensor.to(device, non_blocking=True) for tensor in tensors]


def find_set(name):
    """The directory of the set prepared as datasets/<name>, or `name` if that is one, or None."""
    for folder in (Path(name), DATASETS / name):
        if (folder / "about.json").is_file():
            return folder


def load_arrays(folder, prefix, facts):
    """Images and labels of a part of a set, "" or "holdout-". ValueError if they do not fit."""
    images, labels = (
        np.load(existing_file(folder / f"{prefix}{name}.npy"), mmap_mode="r", allow_pickle=False)
        for name in ("images", "labels"))
    _, channels, side, _ = images.shape
    if (images.shape != (len(labels), channels, side, side)
            or images.dtype != (np.float32 if facts["latent"] else np.uint8)
            or np.any((labels < 0) | (labels >= len(facts["counts"])))):
        raise ValueError("its files do not fit together; prepare the set again")
    return images, labels


def load_dataset(name):
    """The set prepared as datasets/<name>, or in the directory `name`.
    Raises UserError that says how to get it."""
    folder = find_set(name)
    if not folder:
        if name in PUBLIC_SETS or Path(name).exists():
            raise UserError(f"dataset: {name} is not prepared yet; "
                            f"do it once with: python data.py {name}")
        ready = ", ".join(sorted(path.parent.name for path in DATASETS.glob("[!.]*/about.json")))
        raise UserError(f"dataset: there is no {name[:200]!r}; ready: {ready}; "
                        "python data.py SOURCE prepares others")
    with reading(folder):
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError("was prepared by another version of this code; "
                             "do it again with --overwrite")
        facts = about["facts"]
        images, labels = load_arrays(folder, "", facts)
        held_images, held_labels = load_arrays(folder, "holdout-", facts)
        if (np.bincount(labels).tolist() != facts["counts"]
                or images.shape[1:] != held_images.shape[1:]
                or not np.isfinite(facts["mean"] + facts["std"]).all()
                or min(facts["std"]) <= 0):
            raise ValueError("about.json does not fit its images; prepare the set again")
    holdout = Dataset(held_images, held_labels, facts) if len(held_images) else None
    return Dataset(images, labels, facts, holdout)


def describe(facts):
    """How many images of which classes, in one line."""
    kind = "latents" if facts["latent"] else "images"
    pairs = [f"{name} {count:,}" for name, count in zip(facts["classes"], facts["counts"])]
    classes = "no classes"
    if pairs:
        more = ", ..." if len(pairs) > 20 else ""
        classes = f"{len(pairs)} classes: {', '.join(pairs[:20])}{more}"
    return f"{sum(facts['counts']):,} {kind}, {classes}"


@lru_cache(maxsize=2)  # a batch may hold the end of one epoch and the beginning of the next
def epoch_order(size, seed, epoch):
    """The order in which one epoch shows a dataset: a permutation of 0..size-1."""
    return np.random.default_rng((seed, epoch)).permutation(size)


def batch_indices(size, seed, start, count):
    """Indices of the images that training shows at places start .. start+count-1, every epoch being
    a new shuffle. Why a function of its arguments alone: a run can stop anywhere and resume, on any
    number of processes."""
    epochs, places = np.divmod(np.arange(start, start + count), size)
    parts = []
    for epoch in np.unique(epochs):
        order = epoch_order(size, seed, int(epoch))
        parts.append(order[places[epochs == epoch]])
    return np.concatenate(parts)


def mean_and_std(facts, device):
    """Mean and standard deviation of the set, of each channel for latents, (1 or C, 1, 1) each."""
    return (torch.tensor(facts[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))


def to_network(images, facts):
    """What the network sees: float32 with mean 0 and standard deviation sigma_data over the set."""
    mean, std = mean_and_std(facts, images.device)
    return (images.float() - mean) * (Denoiser.sigma_data / std)


def from_network(x, facts):
    """Undo `to_network`; pixels are rounded and clipped to uint8, latents stay float32."""
    mean, std = mean_and_std(facts, x.device)
    x = x * (std / Denoiser.sigma_data) + mean
    return x if facts["latent"] else x.round().clamp(0, 255).to(torch.uint8)


def to_picture(image):
    """One image (1 or 3, H, W), uint8, for Pillow."""
    image = np.asarray(image)
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def make_grid(images, columns, names=()):
    """Images (N, C, S, S), uint8, as one Pillow image, small ones enlarged, the names of the rows
    at their left."""
    side = images.shape[-1] * max(1, 64 // images.shape[-1])
    cell = side + 2
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(12)
    names = [name[:16] for name in names]
    margin = 2 + max((10 + int(font.getlength(name)) for name in names), default=0)
    mode = "L" if images.shape[1] == 1 else "RGB"
    sheet = Image.new(mode, (columns * cell + margin, rows * cell + 2), "#303030")
    for i, image in enumerate(images):
        picture = to_picture(image).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (i % columns * cell + margin, i // columns * cell + 2))
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        middle = row * cell + cell // 2
        draw.text((margin - 6, middle), name, "white", font, anchor="rm")
    return sheet


def main():
    from prepare.sets import main  # which nothing else here needs
    main()


if __name__ == "__main__":
    run_main(main)
