"""Datasets: images as uint8 (N, C, S, S), labels as int64 (N,), and the way to and from what the network sees.

Only this file knows formats. A new one is a function that returns a Dataset, named in LOADERS.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch


@dataclass
class Dataset:
    """A set small enough to live on one device as one tensor.

    images: uint8 (N, C, S, S), values 0 to 255. labels: int64 (N,), values 0 to num_classes - 1.
    mean, std: of all the images' values, computed once; the run stores them, since sampling has to undo them.
    """

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int
    mean: float | None = None
    std: float | None = None

    def __post_init__(self):
        if self.mean is None:
            histogram = torch.bincount(self.images.flatten(), minlength=256).double()     # exact, and no float copy
            values = torch.arange(256).double()
            self.mean = float((histogram * values).sum() / histogram.sum())
            self.std = float(((histogram * (values - self.mean) ** 2).sum() / histogram.sum()).sqrt())

    def __len__(self):
        return len(self.images)

    def to(self, device):
        return Dataset(self.images.to(device), self.labels.to(device), self.num_classes, self.mean, self.std)

    @property
    def stats(self):
        return {"mean": self.mean, "std": self.std}

    def batch(self, indices):
        """Images as the network sees them, float32 of mean 0 and standard deviation 0.5, and their labels."""
        indices = indices.to(self.images.device)
        return to_network(self.images[indices], self.stats), self.labels[indices]


def to_network(images, stats):
    """uint8 -> float32 with mean 0 and standard deviation 0.5 over the dataset."""
    return (images.float() - stats["mean"]) * (0.5 / stats["std"])


def to_uint8(x, stats):
    """Undo `to_network`: rounded and clipped to 0..255."""
    return (x * (stats["std"] / 0.5) + stats["mean"]).round().clamp(0, 255).to(torch.uint8)


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


def load_digits():
    """The UCI handwritten digits (E. Alpaydin, C. Kaynak; CC BY 4.0): 1797 images 8×8 of the digits 0 to 9."""
    with np.load(Path(__file__).parent / "datasets" / "digits.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    images = np.round(images * (255 / 16)).astype(np.uint8)                 # stored as 0..16
    return Dataset(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long(), num_classes=10)


LOADERS = {"digits": load_digits}


def load_dataset(name):
    """The dataset called `name`. Raises ValueError if there is none."""
    if name not in LOADERS:
        raise ValueError(f"dataset: there is no {name!r}; there is {', '.join(LOADERS)}")
    return LOADERS[name]()
