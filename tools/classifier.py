"""A small classifier whose features judge samples where Inception's say little: `python -m tools.classifier digits`.

It learns the classes of a set that data.py prepared, prints its accuracy on the held-out part, and writes the weights
of its features, in float16, for fid.py:

    python -m tools.classifier fashion-mnist --out=out/features.pt
    python fid.py compare out/fashion-mnist fashion-mnist --features=tools.classifier:out/features.pt --count=10000

Why: Inception was trained on large colour photographs, and distances between raw pixels hardly see what a picture
shows. Only compare distances computed with the same file: another training gives other features. It knows the images
that it was trained on, so compare with the held-out part (datasets/fashion-mnist/holdout-images.npy) where small
differences matter.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import batch_indices, load_dataset
from plumbing.command import Parser, UserError, between, path_type, track, run_main
from plumbing.files import atomic_file
from plumbing.processes import choose_device


class Features(nn.Sequential):
    """Images uint8 (N, 3, S, S), S >= 8 -> (N, 128): three convolutions, each followed by a pooling, and the mean over
    pixels. What --features=tools.classifier:FILE of fid.py makes, and loads FILE into."""

    def __init__(self):
        super().__init__(*(layer for fan_in, fan_out in ((3, 32), (32, 64), (64, 128)) for layer in (
            nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out), nn.ReLU(), nn.MaxPool2d(2))))

    def forward(self, images):
        if min(images.shape[2:]) < 8:
            raise ValueError(f"images of {images.shape[2]}x{images.shape[3]} pixels are smaller than 8x8")
        return super().forward(images.float() / 127.5 - 1).mean(dim=(2, 3))


def in_batches(dataset, index_lists, device):
    """Yield [images (B, 3, S, S), labels (B,)] for each array of indices. Why three channels: fid.py gives as many."""
    for images, labels in dataset.feed(index_lists, device):
        yield images.expand(-1, 3, -1, -1), labels


def main():
    parser = Parser(__doc__)
    parser.add_argument("dataset", help="name or directory of a set with classes that data.py prepared")
    parser.add_argument("--epochs", type=between(int, 1, 1000), default=5, help="passes over the images (default: 5)")
    parser.add_argument("--seed", type=between(int, 0, 2**31), default=0, help="of the initial weights and the order")
    parser.add_argument("--out", type=path_type, default=Path("out/features.pt"), help="default: out/features.pt")
    args = parser.parse_args()
    dataset, device = load_dataset(args.dataset), choose_device()
    classes, side = len(dataset.facts["classes"]), dataset.shape[1]
    if dataset.facts["latent"] or classes < 2 or not dataset.holdout or side < 8:
        raise UserError(f"{args.dataset}: needs images of 8×8 pixels and more, classes, and a held-out part")
    args.out.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the work
    torch.manual_seed(args.seed)
    features, head = Features().to(device), nn.Linear(128, classes, device=device)
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], lr=0.002)
    steps = -(-args.epochs * len(dataset) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = (batch_indices(len(dataset), args.seed, 128 * step, 128) for step in range(steps))
    for images, labels in track(in_batches(dataset, order, device), "training steps", steps):
        optimizer.zero_grad()
        F.cross_entropy(head(features(images)), labels).backward()
        optimizer.step()
        schedule.step()
    features.eval()
    with torch.no_grad():
        parts = torch.arange(len(dataset.holdout)).split(128)
        right = [(head(features(images)).argmax(1) == labels).float()
                 for images, labels in in_batches(dataset.holdout, [part.numpy() for part in parts], device)]
        print(f"accuracy on {len(dataset.holdout):,} held-out images: {torch.cat(right).mean():.1%}")
    with atomic_file(args.out) as file:
        torch.save({name: value.cpu().half() if value.is_floating_point() else value.cpu()
                    for name, value in features.state_dict().items()}, file)
    print(args.out)


if __name__ == "__main__":
    run_main(main)
