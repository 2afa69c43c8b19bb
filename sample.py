"""Draw images from a trained run: `python sample.py` takes the newest one and writes a grid, one row per class.

`torchrun --nproc_per_node=8 sample.py ...` shares the work; an image depends on its label and seed alone, not on the split.
The sampler takes any callable denoiser(x, sigma, labels). Read ema.py before, data.py after.

Sources: [EDM] Karras et al. 2022, arXiv 2206.00364; [Autoguidance] Karras et al. 2024, arXiv 2406.02507;
guidance in an interval: Kynkäänniemi et al. 2024, arXiv 2404.07724.
"""

import argparse
import errno
import math
import os
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import from_network, make_grid, to_picture, to_uint8
from ema import atomic_file, check_fit, find_snapshot, list_snapshots, load_snapshot
from layers import mp_weights, normalize_weights
from model import Denoiser, config_class


def noise_levels(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """The sampler's noise levels, from sigma_max down to sigma_min and then 0: (steps + 1,), float64 [EDM, Eq. 5]."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def heun_sampler(denoise, noise, labels=None, steps=32, sigma_min=0.002, sigma_max=80.0, rho=7.0,
                 churn=0.0, churn_interval=(0.0, math.inf), churn_noise=1.0, draw=None, watch=None):
    """Follow the probability-flow ODE from noise to images with Heun's second-order method [EDM, Algorithms 1 and 2].

    denoise(x, sigma, labels): the denoised images; x (B, C, S, S), sigma a float. noise: (B, C, S, S), unit normal.
    churn: S_churn of Algorithm 2; at noise levels within churn_interval every step first adds up to churn/steps of the level
    as fresh noise of standard deviation churn_noise, taken from draw() (default: torch's own random state).
    watch(x, sigma): called with what each step starts from.
    Costs 2·steps - 1 calls of `denoise` and returns images like `noise`.
    """
    if steps < 2:
        raise ValueError(f"the sampler needs at least 2 steps, not {steps}")
    draw = draw or (lambda: torch.randn_like(noise))
    sigmas = noise_levels(steps, sigma_min, sigma_max, rho).tolist()
    x = noise * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        if watch:
            watch(x, sigma)
        if churn and churn_interval[0] <= sigma <= churn_interval[1]:
            higher = sigma * (1 + min(churn / steps, math.sqrt(2) - 1))
            x = x + math.sqrt(higher**2 - sigma**2) * churn_noise * draw()
            sigma = higher
        slope = (x - denoise(x, sigma, labels)) / sigma
        x_next = x + (sigma_next - sigma) * slope                           # Euler
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next, labels)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2    # Heun
        x = x_next
    return x


def guided(denoiser, guidance, guide=None, interval=(0.0, math.inf)):
    """A denoise(x, sigma, labels) that extrapolates from a weaker denoiser: weak + guidance·(main - weak).

    guide: the weaker one, shown the same labels [Autoguidance]; without it, `denoiser` itself shown the null label, which
    is classifier-free guidance. Acts for interval[0] < sigma <= interval[1] only [Kynkäänniemi et al. 2024]; 1 is none.
    """
    def denoise(x, sigma, labels):
        if guidance == 1 or not interval[0] < sigma <= interval[1]:
            return denoiser(x, sigma, labels)
        if guide:
            main, weak = denoiser(x, sigma, labels), guide(x, sigma, labels)
        elif x.is_cuda or len(x) <= 32:                                     # large batches gain nothing on a CPU, or lose
            null = torch.full_like(labels, denoiser.net.config.num_classes)
            main, weak = denoiser(torch.cat([x, x]), sigma, torch.cat([labels, null])).chunk(2)
        else:
            main, weak = denoiser(x, sigma, labels), denoiser(x, sigma, None)
        return weak + guidance * (main - weak)

    return denoise


def seeded_noise(seeds, shape, device="cpu"):
    """A function that draws unit normal noise (len(seeds), *shape), new at every call.

    Each image's noise depends on its own seed (0 to 2**32 - 1) alone.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def sample(denoiser, stats, labels, seeds, batch=256, frames=False, denoise=None, **options):
    """Draw one image for each pair of label (int, or num_classes for none) and seed; yields them in batches.

    stats: mean and std of the dataset. denoise: what to sample with, if not `denoiser` itself. options: heun_sampler's.
    Yields uint8 (B, C, S, S) on the CPU, or float32 if `stats` says that these are latents; with `frames`
    (B, steps + 1, C, S, S), what each step starts from and the result.
    """
    config, device = denoiser.net.config, next(denoiser.parameters()).device
    for start in range(0, len(seeds), batch):
        draw = seeded_noise(seeds[start:start + batch], (config.channels, config.image_size, config.image_size), device)
        rows, seen = torch.tensor(labels[start:start + batch], device=device), []

        def watch(x, sigma):                                                # scaled back to the data's own range
            seen.append(x * (denoiser.sigma_data / math.hypot(sigma, denoiser.sigma_data)))

        x = heun_sampler(denoise or denoiser, draw(), rows, draw=draw, watch=watch if frames else None, **options)
        x = torch.stack([*seen, x], dim=1) if frames else x
        yield (from_network(x, stats) if stats["latent"] else to_uint8(x, stats)).cpu()


def save_picture(image, path):
    """Write one image as a PNG."""
    with atomic_file(path) as file:
        to_picture(image).save(file, format="PNG")


def save_grid(images, columns, path):
    """Write images (N, 1 or 3, S, S), uint8, as one PNG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_picture(make_grid(images, columns), path)


def save_animation(frames, columns, path):
    """Write images in the making (N, frames, C, S, S), uint8, as an animated GIF of their grid; the last frame stays."""
    first, *rest = [to_picture(make_grid(images, columns)) for images in frames.unbind(1)]
    with atomic_file(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=[100] * len(rest) + [2000], loop=0)


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


def newest_run(folder="out"):
    """The run directory under `folder` with the newest snapshot. Raises ValueError if there is none."""
    snapshots = [path for run in Path(folder).glob("*/ema") for _, _, path in list_snapshots(run)]
    if not snapshots:
        raise ValueError(f"no run with a snapshot under {folder}/; train one: python train.py --config=configs/digits.toml")
    return max(snapshots, key=lambda path: path.stat().st_mtime).parent.parent


def load_denoiser(path, device, std=None):
    """The denoiser in a snapshot file, or the last one of EMA width `std` (None: the widest) in a run directory.

    Returns it in eval mode, with the statistics of its dataset. Widths that were not tracked are reconstructed.
    Raises ValueError, in one line naming the file, if there is none.
    """
    path = Path(path)
    if path.is_file() and std is not None:
        raise ValueError(f"{path} is one snapshot; to choose an EMA width, name the run directory")
    if not path.exists():
        raise ValueError(f"{path}: no such run or snapshot")
    if path.is_dir():
        path = find_snapshot(path / "ema" if (path / "ema").is_dir() else path, std)
    snapshot = load_snapshot(path)
    check_fit(snapshot)
    try:
        config = config_class(snapshot["info"].get("variant", ""))(**snapshot["info"]["model"])
        stored, tokens = sum(weight.numel() for weight in snapshot["weights"].values()), (config.image_size // config.patch) ** 2
        if config.width * max(config.width * config.depth, config.num_classes, config.channels) > stored or tokens * config.width > 2**30:
            raise ValueError("its configuration is of a larger network than its weights")
        denoiser = Denoiser(config)
        denoiser.load_state_dict(snapshot["weights"])
        stats = {name: snapshot["info"]["data"][name] for name in ("mean", "std", "latent")}
        from_network(torch.zeros(1, denoiser.net.config.channels, 1, 1), stats)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: no denoiser of this code ({str(error).splitlines()[0]})") from None
    normalize_weights(mp_weights(denoiser))                                 # averaging made them shorter than 1
    return denoiser.to(device).eval(), stats


def use_threads(run):
    """Take as many CPU threads as the run in this directory was trained with, if its configuration says."""
    try:
        threads = tomllib.loads((Path(run) / "config.toml").read_text(encoding="utf-8"))["threads"]
    except (OSError, ValueError, KeyError):
        return
    if isinstance(threads, int) and threads > 0:
        torch.set_num_threads(threads)


def load_decoder(stats, device):
    """A function from what `sample` yields to uint8 images: for latents, the Stable Diffusion VAE out of `diffusers`.

    EDM2's zips hold latents of images scaled to 0..1, so that is what comes out. Raises ValueError if diffusers is not
    installed or the VAE cannot be had.
    """
    if not stats["latent"]:
        return lambda images: images
    try:
        from diffusers import AutoencoderKL                                 # the only use of a package beyond the five
        vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse").to(device).eval()
    except ImportError:
        raise ValueError("the run draws latents: install diffusers to decode them, or write them as they are with --out=FILE.npz") from None
    except OSError as error:
        raise ValueError(f"the run draws latents, and the VAE to decode them cannot be had ({str(error).splitlines()[0]})") from None

    @torch.no_grad()
    def decode(latents):
        images = torch.cat([vae.decode(part.to(device)).sample.cpu() for part in latents.split(8)])
        return (images.clamp(0, 1) * 255).round().to(torch.uint8)

    return decode


def join_processes():
    """The rank of this process and their number under torchrun, connected, results printed by the first alone; else 0, 1."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    if processes > 1:
        dist.init_process_group("gloo")                                     # only results travel, from the CPU
    return rank, processes


def leave_processes(processes):
    """Wait for the others, who may still be writing, and disconnect."""
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def gather(mine, total, rank, processes):
    """Put together what all processes made: process r has numbers r, r + processes, ... of `total` images."""
    if processes == 1:
        return mine
    share = -(-total // processes)
    padded = torch.cat([mine, mine.new_zeros(share - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def save_images(images, labels, columns, out):
    """Write images, or their frames, as `out` says: a grid, with its animation if there are frames, or arrays."""
    final = images[:, -1] if images.ndim == 5 else images
    if out.suffix == ".npz":
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn = {"latents": final.numpy()} if final.is_floating_point() else {"arr_0": final.permute(0, 2, 3, 1).numpy()}
        with atomic_file(out) as file:
            np.savez(file, labels=np.array(labels), **drawn)
    else:
        save_grid(final, columns, out)
        if images.ndim == 5:
            save_animation(images, columns, out.with_suffix(".gif"))


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(*names, **more):
        parser.add_argument(*names, **more)

    add("run", nargs="?", help="run directory or snapshot file (default: the run under out/ with the newest snapshot)")
    add("--ema", type=float, metavar="STD", help="EMA width, any between 0 and 0.289 (default: the widest in training)")
    add("--labels", type=int, nargs="+", help="classes to draw, a row each (default: all, in a grid the first 16)")
    add("--columns", type=int, default=10, help="images of each class (default: 10)")
    add("--seed", type=int, default=0, help="seed of the first image, the next has seed + 1 (default: 0)")
    add("--batch", type=int, default=256, help="images drawn at once (default: 256)")
    add("--steps", type=int, default=32, help="sampler steps, at least 2 (default: 32)")
    add("--guidance", type=float, default=1.0, help="guidance strength (default: 1, none)")
    add("--guide", metavar="RUN", help="guide by this weaker run or snapshot (default: by the null label)")
    add("--guide-ema", type=float, metavar="STD", help="EMA width of the guide; without --guide, of the same run")
    add("--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"), help="guide for LO < sigma <= HI")
    add("--churn", type=float, default=0.0, help="S_churn, fresh noise at every step (default: 0, deterministic)")
    add("--churn-interval", type=float, nargs=2, metavar=("LO", "HI"), help="S_tmin and S_tmax")
    add("--churn-noise", type=float, help="S_noise, standard deviation of the fresh noise (default: 1)")
    add("--out", type=Path, help="FILE.png: a grid; FILE.npz: arr_0 and labels; no suffix: a directory for PNGs numbered "
                                 "by seed (default: grid.png in the run directory)")
    add("--gif", action="store_true", help="also write the grid as an animation of the denoising")
    add("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    return parser


def check_arguments(args):
    """Raises ValueError, in one line, for values that are wrong whatever the run."""
    for option, strength, off in (("guide", "guidance", 1), ("guide_ema", "guidance", 1), ("guidance_interval", "guidance", 1),
                                  ("churn_interval", "churn", 0), ("churn_noise", "churn", 0)):
        if getattr(args, option) is not None and getattr(args, strength) == off:
            raise ValueError(f"--{option.replace('_', '-')}: does nothing at --{strength}={off}")
    args.guidance_interval = args.guidance_interval or (0.0, math.inf)
    args.churn_interval = args.churn_interval or (0.0, math.inf)
    args.churn_noise = 1.0 if args.churn_noise is None else args.churn_noise
    for name, least in dict(columns=1, steps=2, seed=0, batch=1, guidance=0, churn=0, churn_noise=0).items():
        if not least <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}: must be at least {least}, not {getattr(args, name)}")
    for name in ("guidance_interval", "churn_interval"):
        low, high = getattr(args, name)
        if not low < high:
            raise ValueError(f"--{name.replace('_', '-')}: {low:g} to {high:g} is upside down")
        if low >= 80 or high <= 0.002:
            raise ValueError(f"--{name.replace('_', '-')}: {low:g} to {high:g} lies outside the noise levels, 0.002 to 80")
    if args.gif and args.out and args.out.suffix != ".png":
        raise ValueError(f"--gif: goes with a grid, but --out is {args.out}")


def check_guidance(denoiser, stats, guidance, guide=None, guide_stats=None):
    """Raises ValueError if the guide is for other images, or there is none and the null label was never trained."""
    config = denoiser.net.config
    if guide:
        if guide_stats != stats:
            raise ValueError("--guide: was trained on data of another mean and standard deviation")
        for name in ("channels", "image_size", "num_classes"):
            ours, theirs = getattr(config, name), getattr(guide.net.config, name)
            if ours != theirs:
                raise ValueError(f"--guide: has {name} = {theirs}, but the run has {ours}")
    elif guidance != 1 and not config.num_classes:
        raise ValueError("--guidance: the run has no labels to guide with; name a weaker one with --guide")
    elif guidance != 1 and not config.label_dropout:
        raise ValueError("--guidance: the run was trained without null labels (label_dropout = 0); name a weaker one with --guide")


def choose_labels(args, classes):
    """A label for each image, --columns of every class asked for. Raises ValueError for a class that is not there."""
    rows = args.labels or range(max(classes, 1))
    if not args.labels and (args.out is None or args.out.suffix == ".png"):
        rows = rows[:16]
    for label in args.labels or []:
        if not 0 <= label < classes:
            raise ValueError(f"--labels: there is no class {label}; the run knows {f'0 to {classes - 1}' if classes else 'none'}")
    labels = [label for label in rows for _ in range(args.columns)]
    if args.seed + len(labels) > 2**32:
        raise ValueError(f"--seed: must leave the last seed below 2**32, not {args.seed}")
    return labels


def prepare_output(out):
    """Make the directory that `out` needs, or is. Raises ValueError if that cannot be."""
    if out.suffix not in (".png", ".npz", "") or (out.suffix and out.is_dir()):
        raise ValueError(f"--out: {out} must end in .png or .npz, or be a directory without a suffix")
    folder = out.parent if out.suffix else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not out.suffix and any(out.glob("*.png")):
            raise ValueError(f"--out: {out} holds images already, which these would mix with")
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable")
    except OSError as error:
        raise ValueError(f"--out: cannot write to {folder} ({error.strerror})") from None


def main():
    parser = make_parser()
    args = parser.parse_args()
    rank, processes = join_processes()
    try:
        check_arguments(args)
        device = choose_device(args.device, int(os.environ["LOCAL_RANK"]) if processes > 1 else None)
        run = Path(args.run or newest_run())
        use_threads(run)
        if rank > 0:
            dist.barrier()                                                  # the first process may have to reconstruct
        denoiser, stats = load_denoiser(run, device, args.ema)
        guide = guide_stats = None
        if args.guide or args.guide_ema is not None:
            guide, guide_stats = load_denoiser(args.guide or run, device, args.guide_ema)
        if processes > 1 and rank == 0:
            dist.barrier()
        check_guidance(denoiser, stats, args.guidance, guide, guide_stats)
        labels = choose_labels(args, denoiser.net.config.num_classes)
        if len(labels) < processes:
            raise ValueError(f"{len(labels)} images are too few for {processes} processes")
        out = args.out or next(folder for folder in (run, *run.parents) if folder.is_dir() and folder.name not in ("ema", "posthoc")) / "grid.png"
        prepare_output(out)
        if stats["latent"] and args.gif:
            raise ValueError("--gif: cannot show latents")
        decode = load_decoder(stats, device) if out.suffix != ".npz" else lambda made: made
    except ValueError as error:
        parser.error(str(error))
    seeds = range(args.seed, args.seed + len(labels))

    mine, begin, done, images = seeds[rank::processes], time.monotonic(), 0, []
    for made in sample(denoiser, stats, labels[rank::processes], mine, args.batch, frames=args.gif,
                       denoise=guided(denoiser, args.guidance, guide, args.guidance_interval), steps=args.steps,
                       churn=args.churn, churn_interval=args.churn_interval, churn_noise=args.churn_noise):
        made = decode(made)
        if out.suffix in (".png", ".npz"):
            images.append(made)
        else:
            for seed, image in zip(mine[done:], made):
                save_picture(image, out / f"{seed:06d}.png")
        done += len(made)
        rate = done / (time.monotonic() - begin)
        if rank == 0:
            everywhere = f" in each of {processes} processes" if processes > 1 else ""
            print(f"{done}/{len(mine)} images{everywhere}  {rate:.1f} images/s  {(len(mine) - done) / rate:.0f} s left",
                  end="\r" if sys.stderr.isatty() and done < len(mine) else "\n", file=sys.stderr, flush=True)
    if images:
        images = gather(torch.cat(images), len(seeds), rank, processes)
        if rank == 0:
            save_images(images, labels, args.columns, out)
    print(out)
    leave_processes(processes)


if __name__ == "__main__":
    main()
