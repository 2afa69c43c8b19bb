"""Draw images from a trained run: `python sample.py` takes the newest one and writes a grid, one row per class.

Source: [EDM] Karras et al. 2022, arXiv 2206.00364. The sampler takes any callable denoiser(x, sigma, labels).
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import to_uint8
from ema import list_snapshots, load_snapshot
from layers import mp_weights, normalize_weights
from model import Denoiser, DiTConfig


def noise_levels(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """The sampler's noise levels, from sigma_max down to sigma_min and then 0: (steps + 1,), float64 [EDM, Eq. 5]."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def heun_sampler(denoise, noise, labels=None, steps=32, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Follow the probability-flow ODE from noise to images with Heun's second-order method [EDM, Algorithm 1].

    denoise(x, sigma, labels): the denoised images; x (B, C, S, S), sigma a float. noise: (B, C, S, S), unit normal.
    Costs 2·steps - 1 calls of `denoise` and returns images like `noise`.
    """
    if steps < 2:
        raise ValueError(f"the sampler needs at least 2 steps, not {steps}")
    sigmas = noise_levels(steps, sigma_min, sigma_max, rho).tolist()
    x = noise * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        slope = (x - denoise(x, sigma, labels)) / sigma
        x_next = x + (sigma_next - sigma) * slope                           # Euler
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next, labels)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2    # Heun
        x = x_next
    return x


def seeded_noise(seeds, shape, device="cpu"):
    """Unit normal noise (len(seeds), *shape). Each image's noise depends on its own seed (0 to 2**32 - 1) alone."""
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(device)


def sample(denoiser, stats, labels, seeds, steps=32, batch=256, progress=None):
    """Images (N, C, S, S), uint8 on the CPU, one for each pair of label (int, or num_classes for none) and seed.

    stats: mean and std of the dataset. progress: called after every batch with the number of images done.
    """
    config, device, images = denoiser.net.config, next(denoiser.parameters()).device, []
    for start in range(0, len(seeds), batch):
        noise = seeded_noise(seeds[start:start + batch], (config.channels, config.image_size, config.image_size), device)
        rows = torch.tensor(labels[start:start + batch], device=device)
        images.append(to_uint8(heun_sampler(denoiser, noise, rows, steps), stats).cpu())
        if progress:
            progress(start + len(rows))
    return torch.cat(images)


def save_grid(images, columns, path):
    """Write images (N, 1 or 3, S, S), uint8, as one PNG, row by row; small ones are enlarged by whole pixels."""
    channels, size = images.shape[1], images.shape[-1]
    enlarge = max(1, 64 // size)
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    cell = size * enlarge + 2
    rows = -(-len(images) // columns)
    sheet = np.full((rows * cell + 2, columns * cell + 2, channels), 48, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * cell + 2, i % columns * cell + 2
        sheet[top:top + cell - 2, left:left + cell - 2] = image.permute(1, 2, 0).numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet).save(path)


def choose_device(name="", local_rank=None):
    """The device called `name`, or the best there is: cuda, mps, cpu. Raises ValueError if it cannot be used.

    local_rank: which of several processes on this machine asks; each gets its own GPU, or a share of the CPU.
    """
    if not name:
        mps = torch.backends.mps.is_available() and local_rank is None
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank or 0}" if name == "cuda" else name)
        if device.type not in ("cuda", "cpu") and (device.type != "mps" or local_rank is not None):
            raise RuntimeError("choose cuda, cpu or, for a single process, mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used ({str(error).splitlines()[0]})") from None
    return device


def load_denoiser(path, device):
    """The denoiser in a snapshot file, in eval mode, and the statistics of its dataset."""
    snapshot = load_snapshot(path)
    denoiser = Denoiser(DiTConfig(**snapshot["info"]["model"]))
    denoiser.load_state_dict(snapshot["weights"])
    normalize_weights(mp_weights(denoiser))                                 # averaging made them shorter than 1
    return denoiser.to(device).eval(), snapshot["info"]["data"]


def newest_run(folder="out"):
    """The run directory under `folder` with the newest snapshot. Raises ValueError if there is none."""
    snapshots = [path for run in Path(folder).glob("*/ema") for _, _, path in list_snapshots(run)]
    if not snapshots:
        raise ValueError(f"no run with a snapshot under {folder}/; train one: python train.py --config=configs/digits.toml")
    return max(snapshots, key=lambda path: path.stat().st_mtime).parent.parent


def choose_snapshot(run, std=None):
    """The last snapshot of a run directory: of width `std`, or of the widest. Raises ValueError if there is none."""
    snapshots = list_snapshots(Path(run) / "ema")
    if not snapshots:
        raise ValueError(f"{run}: no snapshots in {Path(run) / 'ema'}")
    stds = sorted({width for _, width, _ in snapshots})
    std = stds[-1] if std is None else std
    if std not in stds:
        raise ValueError(f"{run}: no snapshot of EMA width {std}; there are {', '.join(map(str, stds))}")
    return [path for _, width, path in snapshots if width == std][-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run directory (default: the one under out/ with the newest snapshot)")
    parser.add_argument("--labels", type=int, nargs="+", help="classes to draw, a row each (default: all, 16 at most)")
    parser.add_argument("--columns", type=int, default=10, help="images of each class (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image, the next has seed + 1 (default: 0)")
    parser.add_argument("--steps", type=int, default=32, help="sampler steps, at least 2 (default: 32)")
    parser.add_argument("--ema", type=float, help="EMA width of the snapshot (default: the widest)")
    parser.add_argument("--batch", type=int, default=256, help="images drawn at once (default: 256)")
    parser.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--out", help="the PNG to write (default: grid.png in the run directory)")
    args = parser.parse_args()

    try:
        device = choose_device(args.device)
        run = Path(args.run or newest_run())
        path = choose_snapshot(run, args.ema)
        denoiser, stats = load_denoiser(path, device)
    except ValueError as error:
        parser.error(str(error))
    classes = denoiser.net.config.num_classes
    rows = args.labels if args.labels is not None else list(range(min(classes, 16))) or [0]
    for label in rows:
        if not 0 <= label < max(classes, 1):
            knows = f"0 to {classes - 1}" if classes else "none"
            parser.error(f"--labels: there is no class {label}; the run knows {knows}")
    for name, least in (("columns", 1), ("steps", 2), ("seed", 0), ("batch", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: must be at least {least}, not {getattr(args, name)}")

    labels = [label for label in rows for _ in range(args.columns)]
    seeds = [args.seed + i for i in range(len(labels))]
    if seeds[-1] >= 2**32:
        parser.error(f"--seed: must leave the last seed below 2**32, not {args.seed}")
    out = Path(args.out or run / "grid.png")
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        parser.error(f"--out: {out} must end in .png and lie in a directory that exists")

    begin = time.monotonic()

    def progress(done):
        seconds = time.monotonic() - begin
        left = seconds / done * (len(seeds) - done)
        print(f"{done}/{len(seeds)} images  {done / seconds:.1f} images/s  {left:.0f} s left",
              end="\r" if sys.stderr.isatty() and done < len(seeds) else "\n", file=sys.stderr, flush=True)

    print(f"sampling {len(seeds)} images from {path}", file=sys.stderr)
    images = sample(denoiser, stats, labels, seeds, args.steps, args.batch, progress)
    save_grid(images, args.columns, out)
    print(out)


if __name__ == "__main__":
    main()
