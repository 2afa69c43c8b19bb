"""Draw images from a trained run: `python sample.py` takes the newest, and writes a grid.

`torchrun --nproc_per_node=8 sample.py ...` shares the work; an image depends on its label and seed
alone. The sampler takes any callable denoiser(x, sigma, labels).

Sources: [EDM] Karras et al. 2022, arXiv 2206.00364; [Autoguidance] Karras et al. 2024, arXiv
2406.02507; guidance in an interval: Kynkäänniemi et al. 2024, arXiv 2404.07724.
Read ema.py before, data.py after.
"""

import math
import unicodedata
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from data import from_network, make_grid, to_picture
from ema import reconstruct
from model import Denoiser, DiTConfig
from plumbing.command import Parser, UserError, between, path_type, reading, run_main, warn
from plumbing.config import config_class
from plumbing.files import atomic_file, load_file, save_picture
from plumbing.processes import (PRECISIONS, check_compiler, choose_device, collect, draw_in_shares,
                                join_processes, leave_processes, rank, together, use_bfloat16)
from plumbing.snapshots import list_snapshots, load_snapshots


def noise_levels(steps=32, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """The sampler's noise levels from sigma_max to sigma_min, and 0: steps + 1 floats [EDM, Eq. 5].
    Raises ValueError for numbers that make no such levels.
    Why rho = 7: small steps at low noise, where the image's details are decided."""
    if steps < 2:
        raise ValueError(f"steps: must be at least 2, not {steps}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min, sigma_max: must be positive and rising, "
                         f"not {sigma_min}, {sigma_max}")
    if not rho > 0:
        raise ValueError(f"rho: must be positive, not {rho}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (first + ramp * (last - first)) ** rho
    return [*sigmas.tolist(), 0.0]


@torch.no_grad()
def heun_steps(denoise, noise, labels=None, **levels):
    """Follow the probability-flow ODE from noise to images with Heun's second-order method
    [EDM, Algorithm 1]. Arguments as in heun_sampler(). Yields x and its noise level before the
    first step and after each, steps + 1 times."""
    sigmas = noise_levels(**levels)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32)) * sigmas[0]
    yield x, sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        slope = (x - denoise(x, sigma, labels)) / sigma
        x_next = x + (sigma_next - sigma) * slope  # Euler
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next, labels)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2  # Heun
        x = x_next
        yield x, sigma_next


def heun_sampler(denoise, noise, labels=None, **levels):
    """The images that heun_steps() ends with.

    denoise(x, sigma, labels): the denoised images; x (B, C, S, S), sigma a float. noise:
    (B, C, S, S), unit normal. levels: those of noise_levels(). Uses: heun_steps, noise_levels.
    Costs 2·steps - 1 calls of `denoise`."""
    for x, _ in heun_steps(denoise, noise, labels, **levels):
        pass
    return x


def guided(denoiser, guidance, guide=None, interval=(0.0, math.inf)):
    """A denoise(x, sigma, labels) that extrapolates from a weaker denoiser:
    weak + guidance·(main - weak).

    guide: the weaker one, shown the same labels [Autoguidance]; without it, `denoiser` itself shown
    the null label, which is classifier-free guidance. guidance = 1 is none. It acts for
    interval[0] < sigma <= interval[1]."""
    def denoise(x, sigma, labels):
        main = denoiser(x, sigma, labels)
        if guidance == 1 or not interval[0] < sigma <= interval[1]:
            return main
        weak = guide(x, sigma, labels) if guide else denoiser(x, sigma, None)
        return weak + guidance * (main - weak)

    return denoise


def deal_labels(counts, seeds):
    """Labels (N,) for samples of these seeds (N,): any stretch of seeds has classes in nearly the
    proportions of the data, where class i occurs counts[i] times. Multiples of the golden ratio,
    modulo 1, fill 0..1 evenly from any start on (a low-discrepancy sequence).
    Why: random labels would add the noise of their proportions to a distance. Why by seed: many
    small jobs draw the same samples as a large one."""
    golden = (math.sqrt(5) - 1) / 2
    positions = (np.asarray(seeds) + 0.5) * golden % 1
    return np.searchsorted(np.cumsum(counts) / sum(counts), positions, side="right")


def sample(denoiser, facts, labels, seeds, frames=False, denoise=None, steps=32):
    """Draw one image for each pair of label (num_classes for none) and seed (0 to 2**32 - 1), as
    one batch. Why a generator for each image: so that it does not depend on the others of its
    batch.

    facts: of the dataset. denoise: the function to sample with (default: `denoiser`). Returns uint8
    (B, C, S, S) on the CPU, or float32 if these are latents; with `frames` (B, steps + 1, C, S, S),
    what each step starts from and the result."""
    config, sigma_data = denoiser.net.config, denoiser.sigma_data
    device = next(denoiser.parameters()).device
    shape = (config.channels, config.image_size, config.image_size)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    labels = torch.as_tensor(labels, device=device)
    kept = []
    for x, sigma in heun_steps(denoise or denoiser, noise.to(device), labels, steps=steps):
        if frames:
            kept.append(x * (sigma_data / math.hypot(sigma, sigma_data)))  # in the data's own range
    x = torch.stack(kept, dim=1) if frames else x
    return from_network(x, facts).cpu()


PRETRAINED = Path(__file__).parent / "pretrained"


def newest_run(folder="out"):
    """The run directory under `folder` with the newest snapshot, or else the digits' snapshot that
    comes with the code."""
    runs = Path(folder).rglob("ema")
    snapshots = [path for run in runs for _, _, path in list_snapshots(run)]
    if not snapshots:
        return PRETRAINED / "digits.pt"
    newest = max(snapshots, key=lambda path: path.stat().st_mtime)
    return newest.parent.parent


def find_snapshot(path, std):
    """The last snapshot of width `std` (None: the widest) in a run directory, mixed from the others
    if that width was not tracked; or the one in the file `path`. Raises ValueError."""
    if not path.is_dir():
        if std:
            raise ValueError("is one snapshot; to choose an EMA width, name the run directory")
        return load_file(path)
    folder = path / "ema" if (path / "ema").is_dir() else path
    files = {tracked: file for _, tracked, file in list_snapshots(folder)}  # the last of each width
    std = std or max(files, default=0.1)
    if std in files:
        return load_file(files[std])
    return reconstruct(load_snapshots(folder), [std])[0]


INFO = {"variant": str, "model": dict, "data": dict}  # what a snapshot of a denoiser tells
FACTS = {"latent": bool, "mean": list, "std": list, "classes": list, "counts": list}


def read_info(snapshot):
    """What a snapshot tells of its network and data. Raises ValueError unless all is there."""
    info = snapshot.get("info")
    for known, kinds in ((snapshot, {"info": dict, "weights": dict}), (info, INFO)):
        if any(not isinstance(known.get(name), kind) for name, kind in kinds.items()):
            raise ValueError("is not the snapshot of a denoiser")
    facts = info["data"]
    odd = [name for name, kind in FACTS.items() if not isinstance(facts.get(name), kind)]
    if odd or not np.isfinite(np.array(facts["mean"] + facts["std"], float)).all():
        raise ValueError(f"lacks facts about the data, or they are not finite: {', '.join(odd)}")
    return info


def read_config(Class, info):
    """The configuration of a snapshot's network and the facts of its dataset. Raises ValueError."""
    if unknown := info["model"].keys() - {f.name for f in fields(Class)}:
        raise ValueError(f"has keys that this code does not know: {', '.join(sorted(unknown))}")
    config, facts = Class(**info["model"]), info["data"]
    if not config.num_classes:  # an unconditional run, perhaps on labelled images
        facts = facts | {"classes": [], "counts": [sum(facts["counts"])]}
    if len(facts["classes"]) != config.num_classes or not (config.channels and config.image_size):
        raise ValueError("its facts about the data do not fit the network")
    return config, facts


def load_denoiser(path, device, std=None):
    """The denoiser of a run directory or snapshot, see find_snapshot(), in eval mode, and the facts
    of its dataset. Raises UserError."""
    path = Path(path)
    with reading(path, ValueError):
        snapshot = find_snapshot(path, std)
        info = read_info(snapshot)
    Class = config_class(info["variant"], DiTConfig, path)  # outside: its bugs are no damaged file
    with reading(path, ValueError):
        config, facts = read_config(Class, info)
    denoiser = Denoiser(config)
    with reading(path, RuntimeError):  # which says what does not fit
        denoiser.load_state_dict(snapshot["weights"])
    return denoiser.to(device).eval(), facts


def load_decoder(facts, channels, device):
    """A function from what `sample` returns to uint8 images: for latents of 4 channels, the Stable
    Diffusion VAE out of `diffusers`. EDM2's latents are of images scaled to 0..1; the result is
    truncated to integers as EDM2 does. Raises UserError if there is no VAE for the latents."""
    if not facts["latent"]:
        return lambda images: images
    if channels != 4:
        raise UserError(f"the run draws latents of {channels} channels, and the decoder here, "
                        "sd-vae-ft-mse, is for 4; write latents with --out=FILE.npz")
    with reading("the run draws latents, and there is no VAE: "
                 "install diffusers, or write latents with --out=FILE.npz"):
        from diffusers import AutoencoderKL  # the only use of a package beyond the five
        vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse")
        vae = vae.to(device).eval().requires_grad_(False)

    def decode(latents):
        images = [vae.decode(part.to(device)).sample.cpu() for part in latents.split(8)]
        return (torch.cat(images).clamp(0, 1) * 255).to(torch.uint8)

    return decode


def check_guidance(config, facts, guidance, guide=None, guide_facts=None):
    """Raises UserError if a guide is useless or for other images, or there is none and no null
    label was trained."""
    if guide:
        if guidance == 1:
            raise UserError("--guide: does nothing without --guidance")
        ours, theirs = vars(config) | facts, vars(guide.net.config) | guide_facts
        for name in ("channels", "image_size", "num_classes", "mean", "std"):
            if theirs[name] != ours[name]:
                raise UserError(f"--guide: was trained on images with {name} = {theirs[name]}, "
                                f"not {ours[name]}")
    elif guidance != 1 and not (config.num_classes and config.label_dropout):
        raise UserError("--guidance: the run has no labels, or never saw a null label; "
                        "sample.py takes --guide")


def find_label(name, classes):
    """The label of a class, given by its name or, where names are not numbers themselves, by its
    number. Raises UserError."""
    name = unicodedata.normalize("NFC", name)  # as class names are
    if name in classes:
        return classes.index(name)
    numbered = any(other.isdecimal() for other in classes)
    if numbered or not name.isdecimal() or int(name) >= len(classes):
        raise UserError(f"--labels: {name[:60]!r} is none of the {len(classes)} classes "
                        f"{', '.join(classes[:20])}")
    return int(name)


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    level, std = between(float, 0, 1e6), between(float, 0.001, 0.288)
    add("run", nargs="?", type=path_type, help="run directory or snapshot file "
                               "(default: the run under out/ with the newest snapshot, "
                               "else pretrained/digits.pt)")
    add("--ema", type=std, metavar="STD", help="EMA width (default: the widest in training)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--labels", nargs="+", help="classes to draw, by name or number "
                                                    "(default: all, for a grid the first 16)")
    either.add_argument("--count", type=between(int, 1, 10**8),
                        help="number of images, with classes as often as in the data")
    add("--columns", type=between(int, 1, 10**6), default=10,
        help="images of each class (default: 10)")
    add("--seed", type=between(int, 0, 4 * 10**9), default=0,
        help="seed of the first image, then seed + 1 (default: 0)")
    add("--batch", type=between(int, 1, 65536), default=256,
        help="images drawn at once (default: 256)")
    add("--steps", type=between(int, 2, 10000), default=32, help="sampler steps (default: 32)")
    add("--guidance", type=level, default=1.0, help="guidance strength (default: 1, none)")
    add("--guide", type=path_type, metavar="RUN",
        help="guide by this weaker run or snapshot (default: by the null label)")
    add("--guide-ema", type=std, metavar="STD",
        help="EMA width of the guide; without --guide, of the same run")
    add("--guidance-interval", type=level, nargs=2, metavar=("LO", "HI"),
        help="guide for LO < sigma <= HI (default: at all noise levels)")
    add("--out", type=path_type,
        help="FILE.png: a grid; FILE.npz: arr_0 and labels; no suffix: a directory for PNGs "
             "named by seed (default: grid.png in the run directory, or in out/)")
    add("--gif", action="store_true", help="also write the grid as an animation of the denoising")
    add("--precision", choices=PRECISIONS, default="auto",
        help="(default: bfloat16 on GPUs that have it)")
    add("--compile", action="store_true", help="compile the network: worth it for many images")
    add("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    return parser


def load_networks(args, run, device):
    """The denoiser of a run, the facts of its dataset, and the function to sample with, guided as
    the command line says. Raises UserError."""
    denoiser, facts = load_denoiser(run, device, args.ema)
    guide, guide_facts = None, None
    if args.guide or args.guide_ema:
        guide, guide_facts = load_denoiser(args.guide or run, device, args.guide_ema)
    check_guidance(denoiser.net.config, facts, args.guidance, guide, guide_facts)
    interval = args.guidance_interval or (0.0, math.inf)
    if interval[0] >= interval[1]:
        raise UserError("--guidance-interval: LO must be below HI")
    if args.guidance_interval and args.guidance == 1:
        raise UserError("--guidance-interval: needs --guidance")
    for network in filter(None, (denoiser, guide)):
        network.in_bfloat16 = use_bfloat16(args.precision, device)
        if args.compile:
            check_compiler(device)
            network.net.compile()
    return denoiser, facts, guided(denoiser, args.guidance, guide, interval)


def choose_rows(args, facts, num_classes):
    """The labels to draw, each for a row of args.columns images. Raises UserError."""
    if args.labels:
        return [find_label(name, facts["classes"]) for name in args.labels]
    rows = range(max(num_classes, 1))
    return rows[:16] if args.out.suffix == ".png" else rows


def check_out(args, total, config, latent):
    """Raises UserError if what the command line asks for cannot be written to args.out."""
    out = args.out
    frames = args.steps + 1 if args.gif else 1
    pixels = total * frames * max(config.image_size, 64) ** 2
    if out.suffix not in (".png", ".npz", ""):
        raise UserError(f"--out: {out} must end in .png or .npz, or have no suffix: a directory")
    if args.gif and (out.suffix != ".png" or latent):
        raise UserError("--gif: goes with a grid of pixels")
    if total > 10**8:
        raise UserError(f"--columns: makes {total:,} images, more than 10**8")
    if out.suffix == ".png" and pixels > 10**8:
        raise UserError(f"--columns: {total:,} images are too many for a grid; use --out=FILE.npz")
    if not out.suffix and any(out.glob("*.png")):
        raise UserError(f"--out: {out} holds images already, which these would mix with")


def write_grid(path, images, columns, names, animate):
    """Write images (N, C, S, S) as a grid; with `animate` (N, frames, C, S, S), the last frame as a
    grid, and all as a GIF beside it."""
    frames = torch.tensor(images)
    frames = frames.unbind(1) if animate else [frames]
    grids = [make_grid(frame, columns, names) for frame in frames]
    save_picture(grids[-1], path)
    if animate:
        durations = [100] * (len(grids) - 1) + [2000]  # milliseconds
        save_picture(grids[0], path.with_suffix(".gif"), save_all=True, append_images=grids[1:],
                     duration=durations, loop=0)


def write_arrays(path, images, labels, facts):
    """Write images, labels and the names of the classes, which say what labels mean, as an npz."""
    arrays = {"labels": labels, "classes": np.array(facts["classes"], str)}
    if facts["latent"]:
        arrays["latents"] = images
    else:
        arrays["arr_0"] = images.transpose(0, 2, 3, 1)  # (N, H, W, C), as ADM has it
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def default_out(run):
    """Where a run's grid goes: grid.png in the run directory, or in out/ if it came along with the
    code."""
    if run.parent == PRETRAINED:
        return Path("out") / "grid.png"
    homes = [path for path in (run, *run.parents)
             if path.is_dir() and path.name not in ("ema", "posthoc")]
    return homes[0] / "grid.png"


def main():
    join_processes()
    with together():
        args = make_parser().parse_args()
        device = choose_device(args.device)
        run = args.run or newest_run()
        if not args.run:
            warn(f"drawing from {run}")
        denoiser, facts, denoise = load_networks(args, run, device)
        config = denoiser.net.config
        args.out = args.out or default_out(run)
        rows = choose_rows(args, facts, config.num_classes)
        total = args.count or len(rows) * args.columns
        check_out(args, total, config, facts["latent"])
        decode = lambda images: images
        if args.out.suffix != ".npz":
            decode = load_decoder(facts, config.channels, device)
        folder = args.out.parent if args.out.suffix else args.out
        folder.mkdir(parents=True, exist_ok=True)  # fails now rather than after the work
    names = [facts["classes"][row] for row in rows] if facts["classes"] else []
    labels = np.repeat(rows, args.columns)
    if args.count:
        seeds = range(args.seed, args.seed + total)
        names, labels = [], deal_labels(facts["counts"], seeds)

    def draw(numbers):
        seeds = [args.seed + number for number in numbers]
        return decode(sample(
            denoiser, facts, labels[numbers], seeds, args.gif, denoise, args.steps))

    shares = draw_in_shares(draw, total, args.batch)
    if not args.out.suffix:
        for numbers, images in shares:
            for number, image in zip(numbers, images):
                save_picture(to_picture(image), folder / f"{args.seed + number:06d}.png")
    else:
        images = collect(shares, total, folder)
        if rank() == 0 and args.out.suffix == ".png":
            write_grid(args.out, images, args.columns, names, args.gif)
        elif rank() == 0:
            write_arrays(args.out, images, labels, facts)
    print(args.out)
    leave_processes()


if __name__ == "__main__":
    run_main(main)
