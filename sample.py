"""Draw images from a trained run: `python sample.py` takes the newest one and writes a grid, one row per class.

`torchrun --nproc_per_node=8 sample.py ...` shares the work; an image depends on its label and seed alone. The sampler
takes any callable denoiser(x, sigma, labels). Read ema.py before, data.py after.

Sources: [EDM] Karras et al. 2022, arXiv 2206.00364; [Autoguidance] Karras et al. 2024, arXiv 2406.02507;
guidance in an interval: Kynkäänniemi et al. 2024, arXiv 2404.07724.
"""

import math
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import Parser, UserError, from_network, make_grid, number, progress, reading, run_main, say, to_picture
from ema import atomic_file, list_snapshots, load_file, reconstruct
from model import Denoiser, config_class

PRECISIONS = ("auto", "float32", "bfloat16")


@torch.no_grad()
def heun_sampler(denoise, noise, labels=None, steps=32, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Follow the probability-flow ODE from noise to images with Heun's second-order method [EDM, Algorithm 1, Eq. 5].

    denoise(x, sigma, labels): the denoised images; x (B, C, S, S), sigma a float. noise: (B, C, S, S), unit normal.
    Costs 2·steps - 1 calls of `denoise`, steps >= 2."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho     # Eq. 5
    sigmas = [*sigmas.tolist(), 0.0]
    x = noise * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        slope = (x - denoise(x, sigma, labels)) / sigma
        x_next = x + (sigma_next - sigma) * slope                           # Euler
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next, labels)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2    # Heun
        x = x_next
    return x


def guided(denoiser, guidance, guide=None, interval=(0.0, math.inf)):
    """A denoise(x, sigma, labels) that extrapolates from a weaker denoiser: weak + guidance·(main - weak).
    guide: the weaker one, shown the same labels [Autoguidance]; without it, `denoiser` itself shown the null label,
    which is classifier-free guidance. guidance = 1 is none. It acts for interval[0] < sigma <= interval[1]."""
    def denoise(x, sigma, labels):
        if guidance == 1 or not interval[0] < sigma <= interval[1]:
            return denoiser(x, sigma, labels)
        weak = guide(x, sigma, labels) if guide else denoiser(x, sigma, None)
        return weak + guidance * (denoiser(x, sigma, labels) - weak)

    return denoise


def deal_labels(counts, numbers):
    """Labels (N,) for samples with these numbers (N,): any stretch of numbers has classes as often as the data, where
    class i occurs counts[i] times. Why: else a distance from samples to data would measure class shares too."""
    positions = (np.asarray(numbers) + 0.5) * ((math.sqrt(5) - 1) / 2) % 1  # the golden ratio fills 0..1 evenly
    return np.searchsorted(np.cumsum(counts) / sum(counts), positions, side="right")


def sample(denoiser, facts, labels, seeds, frames=False, denoise=None, steps=32):
    """Draw one image for each pair of label (num_classes for none) and seed (0 to 2**32 - 1), as one batch.
    facts: of the dataset. denoise: the function to sample with (default: `denoiser`). Returns uint8 (B, C, S, S) on the
    CPU, or float32 if these are latents; with `frames` (B, steps + 1, C, S, S), what each step starts from and the
    result. Why a generator for each image: so that it does not depend on the others of its batch."""
    config, device, seen = denoiser.net.config, next(denoiser.parameters()).device, {}
    denoise = denoise or denoiser
    shape = config.channels, config.image_size, config.image_size
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def watched(x, sigma, labels):                                          # Heun's x, seen last, replaces Euler's
        seen[sigma] = x * (denoiser.sigma_data / math.hypot(sigma, denoiser.sigma_data))    # in the data's own range
        return denoise(x, sigma, labels)

    labels = torch.as_tensor(labels, device=device)
    x = heun_sampler(watched if frames else denoise, noise.to(device), labels, steps)
    x = torch.stack([*seen.values(), x], dim=1) if frames else x
    return from_network(x, facts).cpu()


def choose_device(name=""):
    """The device called `name`, or the best there is: cuda, mps, cpu; each of several processes gets its own GPU."""
    if not name:
        alone = "RANK" not in os.environ
        name = "cuda" if torch.cuda.is_available() else "mps" if alone and torch.backends.mps.is_available() else "cpu"
    with reading(f"device: {name[:60]!r} cannot be used"):
        if name.split(":")[0] not in ("cuda", "mps", "cpu"):
            raise ValueError("choose cuda, mps or cpu")
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False                                 # float32 is float32, also in convolutions
    return device


def use_bfloat16(precision, device):
    """Whether the network runs in bfloat16: for "auto" on GPUs that have it. Warns where it would only be emulated."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    if precision == "bfloat16" and able and not any(has for name, has in able.items() if "bf16" in name):
        say("warning: this CPU has no bfloat16, and emulating it is very slow")
    return precision == "bfloat16"


def check_compiler(device):
    """Raises UserError if torch.compile lacks what it needs on this device."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        raise UserError(f"compile: needs a C++ compiler; install {compiler}, or do not compile")


def newest_run(folder="out"):
    """The run directory under `folder` with the newest snapshot."""
    snapshots = [path for run in Path(folder).rglob("ema") for _, _, path in list_snapshots(run)]
    if not snapshots:
        raise UserError(f"no run with a snapshot under {folder}/; train: python train.py --config=configs/digits.toml")
    return max(snapshots, key=lambda path: path.stat().st_mtime).parent.parent


def load_denoiser(path, device, std=None):
    """The denoiser in a snapshot file, or of EMA width `std` (None: the widest) in a run directory, its last one, in
    eval mode, and the facts of its dataset. Widths that were not tracked are reconstructed. Raises UserError."""
    path = Path(path)
    with reading(path):
        if path.is_dir():
            folder = path / "ema" if (path / "ema").is_dir() else path
            files = {saved: file for _, saved, file in list_snapshots(folder)}      # the last one of each width
            std = std or max(files, default=0.1)
            snapshot = load_file(files[std]) if std in files else reconstruct(folder, [std])[0]
        elif std:
            raise ValueError("is one snapshot; to choose an EMA width, name the run directory")
        else:
            snapshot = load_file(path)
        if "info" not in snapshot:
            raise ValueError("is not a snapshot")
        facts = snapshot["info"]["data"]
        config = config_class(snapshot["info"]["variant"])(**snapshot["info"]["model"])
    with reading(path, (ValueError, RuntimeError)):                         # bugs of a variant keep their traceback
        denoiser = Denoiser(config)
    with reading(path):
        denoiser.load_state_dict(snapshot["weights"])
        if not config.num_classes:                                          # of an unconditional run on labelled images
            facts |= {"classes": [], "counts": [sum(facts["counts"])]}
        if len(facts["classes"]) != config.num_classes or not np.isfinite(facts["mean"] + facts["std"]).all():
            raise ValueError("its facts about the data do not fit the network, or are not finite")
    return denoiser.to(device).eval(), facts


def load_decoder(facts, device):
    """A function from what `sample` returns to uint8 images: for latents, the Stable Diffusion VAE out of `diffusers`.
    EDM2's latents are of images scaled to 0..1; the result is truncated to integers as EDM2 does."""
    if not facts["latent"]:
        return lambda images: images
    with reading("the run draws latents, and there is no VAE: install diffusers, or write latents with --out=FILE.npz"):
        from diffusers import AutoencoderKL                                 # the only use of a package beyond the five
        vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse").to(device).eval().requires_grad_(False)

    def decode(latents):
        images = torch.cat([vae.decode(part.to(device)).sample.cpu() for part in latents.split(8)])
        return (images.clamp(0, 1) * 255).to(torch.uint8)

    return decode


def check_guidance(config, facts, guidance, guide=None, guide_facts=None):
    """Raises UserError if a guide is useless or for other images, or there is none and no null label was trained."""
    if guide and guidance == 1:
        raise UserError("--guide: does nothing without --guidance")
    if guide:
        ours, theirs = vars(config) | facts, vars(guide.net.config) | guide_facts
        for name in ("channels", "image_size", "num_classes", "mean", "std"):
            if theirs[name] != ours[name]:
                raise UserError(f"--guide: was trained on images with {name} = {theirs[name]}, not {ours[name]}")
    elif guidance != 1 and not (config.num_classes and config.label_dropout):
        raise UserError("--guidance: the run has no labels, or never saw a null label; sample.py takes --guide")


def join_processes():
    """The rank of this process and their number; under torchrun they are connected, and the first prints results."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        if rank > 0:
            sys.stdout = open(os.devnull, "w")
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=timedelta(hours=2))       # while one writes, the others wait
    return rank, processes


def leave_processes(processes, code=0):
    """Wait for the others, who may still be writing, disconnect and exit with `code`. Why by os._exit: if Python ends
    as usual, torch.distributed (2.13) aborts it in one of ten runs, and torchrun then reports a failure."""
    if processes == 1:
        sys.exit(code)
    last = torch.zeros(1)                                                   # kept, or torch 2.6 may wait here for ever
    dist.all_reduce(last)                                                   # on the CPU: a barrier may ask for a GPU
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(code)


def gather(mine, processes):
    """The tensors of all processes, which have one shape, in their order."""
    tensors = [mine] + [torch.empty_like(mine) for _ in range(processes - 1)]
    if processes > 1:
        dist.all_gather(tensors, mine)
    return tensors


def exchange(text, processes):
    """Gather one text of up to 16 KB from each process, in their order. Why as tensors: all_gather_object unpickles."""
    padded = text.encode(errors="replace").ljust(2**14, b"\0")
    tensors = gather(torch.tensor(list(padded), dtype=torch.uint8), processes)
    return [bytes(tensor.tolist()).rstrip(b"\0").decode() for tensor in tensors]


@contextmanager
def together(processes):
    """A part in which a process may raise UserError or OSError: then all of them raise UserError. Why: so that the
    error is printed once, and no process waits for one that has ended."""
    refusal = ""
    try:
        yield
    except (UserError, OSError) as error:
        if processes == 1:
            raise
        refusal = str(error)[:2000]
    refusal = next(filter(None, exchange(refusal, processes)), "")
    if refusal:
        raise UserError(refusal if os.environ.get("LOCAL_RANK", "0") == "0" else "")


def save_picture(picture, path, **options):
    """Write a Pillow image as the kind of file that the suffix of `path` says. options: Pillow's."""
    with atomic_file(path) as file:
        picture.save(file, format=Path(path).suffix[1:].upper(), **options)


def find_label(name, classes):
    """The label of a class, given by its name or, where names are not numbers themselves, by its number. UserError."""
    if name in classes:
        return classes.index(name)
    if not name.isdecimal() or int(name) >= len(classes) or any(other.isdecimal() for other in classes):
        raise UserError(f"--labels: {name[:60]!r} is none of the {len(classes)} classes {', '.join(classes[:20])}")
    return int(name)


def make_parser():
    parser = Parser(__doc__)
    add, level, std = parser.add_argument, number(float, 0, 1e6), number(float, 0.001, 0.288)
    add("run", nargs="?", help="run directory or snapshot file (default: the run under out/ with the newest snapshot)")
    add("--ema", type=std, metavar="STD", help="EMA width (default: the widest in training)")
    classes = parser.add_mutually_exclusive_group().add_argument
    classes("--labels", nargs="+", help="classes to draw, by name or number (default: all, for a grid the first 16)")
    classes("--count", type=number(int, 1, 10**8), help="number of images, with classes as often as in the data")
    add("--columns", type=number(int, 1, 10**6), default=10, help="images of each class (default: 10)")
    add("--seed", type=number(int, 0, 4 * 10**9), default=0, help="seed of the first image, then seed + 1 (default: 0)")
    add("--batch", type=number(int, 1, 65536), default=256, help="images drawn at once (default: 256)")
    add("--steps", type=number(int, 2, 10000), default=32, help="sampler steps (default: 32)")
    add("--guidance", type=level, default=1.0, help="guidance strength (default: 1, none)")
    add("--guide", metavar="RUN", help="guide by this weaker run or snapshot (default: by the null label)")
    add("--guide-ema", type=std, metavar="STD", help="EMA width of the guide; without --guide, of the same run")
    add("--guidance-interval", type=level, nargs=2, default=(0, 1e6), metavar=("LO", "HI"), help="LO < sigma <= HI")
    add("--out", type=Path, help="FILE.png: a grid; FILE.npz: arr_0 and labels; no suffix: a directory for PNGs named "
                                 "by seed (default: grid.png in the run directory)")
    add("--gif", action="store_true", help="also write the grid as an animation of the denoising")
    add("--precision", choices=PRECISIONS, default="auto", help="(default: bfloat16 on GPUs that have it)")
    add("--compile", action="store_true", help="compile the network: worth it for many images")
    add("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    return parser


def main():
    rank, processes = join_processes()
    with together(processes):
        args = make_parser().parse_args()
        device, run = choose_device(args.device), Path(args.run or newest_run())
        denoiser, facts = load_denoiser(run, device, args.ema)
        config, guide, guide_facts = denoiser.net.config, None, None
        if args.guide or args.guide_ema:
            guide, guide_facts = load_denoiser(args.guide or run, device, args.guide_ema)
        check_guidance(config, facts, args.guidance, guide, guide_facts)
        for network in filter(None, (denoiser, guide)):
            network.in_bfloat16 = use_bfloat16(args.precision, device)
            if args.compile:
                check_compiler(device)
                network.net.compile()
        homes = [path for path in (run, *run.parents) if path.is_dir() and path.name not in ("ema", "posthoc")]
        out = args.out or homes[0] / "grid.png"
        grid, npz, folder = (out.suffix == suffix for suffix in (".png", ".npz", ""))
        rows = [find_label(name, facts["classes"]) for name in args.labels or []]
        rows = rows or range(max(config.num_classes, 1))[:16 if grid else None]
        total = args.count or len(rows) * args.columns
        pixels = total * (args.steps + 1 if args.gif else 1) * max(config.image_size, 64) ** 2
        for wrong, text in (
                (not (grid or npz or folder), f"--out: {out} must end in .png or .npz, or have no suffix: a directory"),
                (args.gif and (not grid or facts["latent"]), "--gif: goes with a grid of pixels"),
                (args.guidance_interval[0] >= args.guidance_interval[1], "--guidance-interval: LO must be below HI"),
                (args.guidance_interval != (0, 1e6) and args.guidance == 1, "--guidance-interval: needs --guidance"),
                (total > 10**8, f"--columns: makes {total:,} images, more than 10**8"),
                (grid and pixels > 10**8, f"--columns: {total:,} images are too many for a grid; use --out=FILE.npz"),
                (folder and any(out.glob("*.png")), f"--out: {out} holds images already, which these would mix with")):
            if wrong:
                raise UserError(text)
        labels = deal_labels(facts["counts"], range(total)) if args.count else np.repeat(rows, args.columns)
        decode = (lambda images: images) if npz else load_decoder(facts, device)
        place = out if folder else out.parent
        place.mkdir(parents=True, exist_ok=True)                            # fails now rather than after the work

    denoise = guided(denoiser, args.guidance, guide, args.guidance_interval)
    scratch = tempfile.TemporaryFile(dir=place) if rank == 0 and not folder else None   # memory may not hold them all
    at_once = args.batch * processes
    for start in progress(range(0, total, at_once), "images", total, lambda start: min(at_once, total - start)):
        share = min(args.batch, -(-(total - start) // processes))           # equal shares: numbers past the last wrap
        numbers = [(start + rank * share + i) % total for i in range(share)]
        seeds = [args.seed + i for i in numbers]
        images = decode(sample(denoiser, facts, labels[numbers], seeds, args.gif, denoise, args.steps))
        if folder:
            for seed, image in zip(seeds, images):
                save_picture(to_picture(image), out / f"{seed:06d}.png")
            continue
        images = torch.cat(gather(images.contiguous(), processes))[:total - start]
        if scratch:
            scratch.write(images.numpy())
    if scratch:
        scratch.flush()
        images = np.memmap(scratch, images.numpy().dtype, "r", shape=(total, *images.shape[1:]))
        if npz:
            arrays = {"latents": images} if facts["latent"] else {"arr_0": images.transpose(0, 2, 3, 1)}
            with atomic_file(out) as file:
                np.savez(file, labels=labels, **arrays)
        else:
            frames = torch.tensor(images).view(total, -1, *images.shape[-3:]).unbind(1)     # one, or with --gif all
            names = [facts["classes"][row] for row in rows] if facts["classes"] and not args.count else ()
            grids = [make_grid(frame, args.columns, names) for frame in frames]
            save_picture(grids[-1], out)
            if args.gif:                                                # 0.1 s for each frame, 2 s for the last
                save_picture(grids[0], out.with_suffix(".gif"), save_all=True, append_images=grids[1:],
                             duration=[100] * (len(grids) - 1) + [2000], loop=0)
    print(out)
    leave_processes(processes)


if __name__ == "__main__":
    run_main(main)
