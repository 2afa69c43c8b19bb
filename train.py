"""Train a diffusion transformer with the EDM2 recipe: `python train.py
--config=configs/digits.toml`.

`torchrun --nproc_per_node=8 train.py` trains on eight GPUs. Any key can be set on the command line:
--model.depth=8. Started again with the same `out`, a run resumes from its last saved state, and
ends as if it had never stopped.

Source: [EDM2] Karras et al. 2024, arXiv 2312.02696. Read model.py before, ema.py and sample.py
after; nothing under plumbing/ is needed to follow a step.
"""

import hashlib
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from data import batch_indices, describe, load_dataset, make_grid, to_network
from ema import PowerEMA
from layers import force_weight_normalization
from model import Denoiser, DiTConfig, edm2_loss, weighted_error
from plumbing.command import UserError, reading, run_main, status
from plumbing.config import experiment_id, load_config
from plumbing.files import atomic_file, save_picture
from plumbing.keys import Configuration, key
from plumbing.processes import (PRECISIONS, choose_device, join_processes, leave_processes,
                                provenance, rank, sum_over_processes, together, use_bfloat16,
                                use_compile, world_size)
from plumbing.run import Run, lock_run
from plumbing.snapshots import save_snapshot
from plumbing.transfer import take_weights
from sample import find_snapshot, read_info, sample


@dataclass
class TrainConfig(Configuration):
    """One experiment, by default on the digits. Raises a ValueError whose message starts with the
    key's name."""

    out: str = key(
        "out/run", "run directory, where everything lands", resumable=True)
    variant: str = key(
        "", "an idea from variants/, by name (empty: none); --help --variant=NAME lists its keys")
    dataset: str = key(
        "digits", "what to train on: name or directory of a set that data.py prepared",
        resumable=True)
    init: str = key(
        "", "run directory or snapshot whose averaged weights to start from (empty: random ones)")
    flip: bool = key(
        False, "mirror half of the images, at random")
    seed: int = key(
        0, "random seed; with the step number it determines all random draws", 0, 2**63 - 1)
    device: str = key(
        "", "cuda, mps or cpu (empty: the best there is)", resumable=True)
    threads: int = key(
        0, "CPU threads of a process (0: as torch chooses)", 0, 256, resumable=True)
    precision: str = key(
        "auto", "of the network: float32, bfloat16 or auto, which is bfloat16 on GPUs that have it",
        choices=PRECISIONS, resumable=True)
    compile: str = key(
        "auto", "torch.compile the network: true, false or auto, which is true on CUDA",
        choices=("auto", "true", "false"), resumable=True)
    steps: int = key(
        2000, "optimizer steps", 1, 10**9, resumable=True)
    batch: int = key(
        64, "images a step, over all processes and micro-batches", 1, 10**6)
    micro_batch: int = key(
        0, "images at once in one process (0: its whole share of the batch)", 0, 10**6,
        resumable=True)
    learning_rate: float = key(
        0.03, "alpha_ref of the schedule, the rate between warm-up and decay", 1e-9, 1e3,
        resumable=True)
    warmup_steps: int = key(
        50, "steps over which the rate rises linearly", 0, 10**9, resumable=True)
    schedule: str = key(
        "sqrt", "how the rate falls: sqrt (see decay_steps), or linear, to 0 after the last step",
        choices=("sqrt", "linear"), resumable=True)
    decay_steps: int = key(
        600, "t_ref: after this many steps the rate falls as 1/sqrt(step) (0: never)", 0, 10**9,
        resumable=True)
    optimizer: str = key(
        "adam", "adam, or muon for the matrices of blocks (variants/muon.py)",
        choices=("adam", "muon"))
    matrix_rate: float = key(
        0.25, "with muon: factor on the learning rate of its matrices", 1e-9, 1e3, resumable=True)
    p_mean: float = key(
        -0.4, "mean of ln(sigma) in training: higher for layout and shape, lower for detail",
        -20, 20)
    p_std: float = key(
        1.0, "standard deviation of ln(sigma) in training", 1e-3, 20)
    ema_stds: tuple[float, ...] = key(
        (0.05, 0.10), "relative widths of the averages tracked", 0.001, 0.288)
    val_every: int = key(
        500, "steps between values of val_loss (0: only one, at the end)", 0, 10**9, resumable=True)
    log_every: int = key(
        50, "steps between lines of log.jsonl", 1, 10**9, resumable=True)
    sample_every: int = key(
        500, "steps between sample grids (0: only one, at the end)", 0, 10**9, resumable=True)
    snapshot_every: int = key(
        100, "steps between EMA snapshots (0: only at the end)", 0, 10**9, resumable=True)
    save_every: int = key(
        500, "steps between states to resume from; the last step always saves one", 1, 10**9,
        resumable=True)
    model: DiTConfig = field(default_factory=DiTConfig)

    def __post_init__(self):
        super().__post_init__()
        for name in ("out", "dataset", "init"):
            setattr(self, name, os.path.expanduser(getattr(self, name)))
        if len({round(std, 3) for std in self.ema_stds}) < len(self.ema_stds):
            raise ValueError(f"ema_stds: {list(self.ema_stds)} must differ in three decimals")


def learning_rate(step, config):
    """Linear warm-up, a plateau at alpha_ref, then 1/sqrt decay [EDM2, Eq. 67]; step from 0.
    Or a linear decay to 0 over the whole run, which more steps, when resuming, take up at the rate
    that a longer run would have there. Why: the weights of a plain network grow, so that a step
    turns them less and less; rows of RMS 1 do not, so their schedule must do it."""
    rate = config.learning_rate * min((step + 1) / (config.warmup_steps + 1), 1)
    if config.schedule == "linear":
        return rate * (1 - step / config.steps)
    decay = max(step / config.decay_steps, 1) if config.decay_steps else 1
    return rate / math.sqrt(decay)


def make_generator(config, number, device):
    """Generator `number` of a run. Why the hash: on CPUs a generator uses only 32 bits of its seed.
    Numbers keep those of a run apart, and hashes those of runs with different seeds."""
    start = int.from_bytes(hashlib.sha256(str(config.seed).encode()).digest()[:4], "big")
    return torch.Generator(device).manual_seed((start + number) % 2**32)


def draw_step(config, dataset, step, device):
    """All random numbers of a step, by name, each a tensor (batch, ...).
    Why for the whole batch, in every process: they do not depend on how it is split over processes
    and micro-batches. (2,048 images of 3×256² are 1.6 GB of noise.)"""
    options = {"generator": make_generator(config, step, device), "device": device}
    images = (config.batch, *dataset.shape)
    ln_sigma = torch.randn(config.batch, **options).mul(config.p_std).add(config.p_mean)
    draws = {"sigma": ln_sigma.exp(),
             "drop": torch.rand(config.batch, **options) < config.model.label_dropout,
             "noise": torch.randn(images, **options)}
    if dataset.facts["latent"]:
        draws["posterior"] = torch.randn(images, **options)
    if config.flip:
        draws["flip"] = torch.rand(config.batch, 1, 1, 1, **options) < 0.5
    return draws


def prepare_batch(config, facts, images, labels, draws, rows):
    """The arguments of the loss for some rows (a slice) of a step: clean images, labels after
    dropout, sigma and noise. images, labels: these rows as the dataset has them; facts: the
    dataset's. draws: of the whole step."""
    draws = {name: draw[rows].to(images.device) for name, draw in draws.items()}
    if facts["latent"]:  # a fresh draw from the VAE's posterior
        mean, std = images.chunk(2, dim=1)
        images = mean + std * draws["posterior"]
    images = to_network(images, facts)
    if "flip" in draws:
        images = torch.where(draws["flip"], images.flip(-1), images)
    null = config.model.num_classes
    if null == 0:  # unconditional: the null label is the only one
        labels = torch.zeros_like(labels)
    else:
        labels = labels.masked_fill(draws["drop"], null)
    return images, labels, draws["sigma"], draws["noise"]


def micro_batches(config):
    """The rows of a step that this process computes, as slices small enough for its memory."""
    share = config.batch // world_size()
    size = config.micro_batch or share
    first = rank() * share
    return [slice(start, start + size) for start in range(first, first + share, size)]


def feed_micro_batches(config, dataset, first_step, device):
    """Yield [images, labels] of each micro-batch of each step, as the dataset has them."""
    def index_lists():
        for step in range(first_step, config.steps):
            indices = batch_indices(len(dataset), config.seed, step * config.batch, config.batch)
            for rows in micro_batches(config):
                yield indices[rows]

    return dataset.feed(index_lists(), device)


def accumulate_gradients(config, facts, model, denoiser, teacher, batches, draws, step):
    """Add up the gradients of the mean loss over a step's micro-batches, and average them over
    processes.

    model: the denoiser, or what DDP makes of it. teacher: an average of it, which the extra loss of
    a variant may use. batches: from feed_micro_batches(). draws: those of the step. Returns this
    process' mean loss and its last micro-batch, for the log to look at."""
    denoiser.zero_grad()
    parts = micro_batches(config)
    mean_loss = 0.0
    for rows in parts:
        images, labels, sigma, noise = prepare_batch(config, facts, *next(batches), draws, rows)
        if world_size() > 1:
            model.require_backward_grad_sync = rows is parts[-1]  # average over processes only once
        number = 2**31 + (step * config.batch + rows.start) // (rows.stop - rows.start)
        generator = make_generator(config, number, images.device)  # draw_step() has those below
        dropout = make_generator(config, number + 2**30, "cpu")
        torch.manual_seed(dropout.initial_seed())

        u = denoiser.uncertainty(sigma)
        loss = edm2_loss(model, u, images, labels, sigma, noise)
        extra = denoiser.net.extra_loss(teacher, images, generator)  # 0 but for some variants
        values = images[0].numel()  # EDM2 sums over channels and pixels
        ((loss + extra) * values / len(parts)).backward()
        mean_loss += loss.detach() / len(parts)
    return mean_loss, (images, labels, sigma, noise)


def optimizer_step(denoiser, optimizer, rate):
    """One step of the optimizer at `rate`, then forced weight normalization.
    Gradients that are not finite count as 0 [EDM2]."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        for p in group["params"]:
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0.0, posinf=0.0, neginf=0.0, out=p.grad)
    optimizer.step()
    force_weight_normalization(denoiser)


def build(config, device, bfloat16=False):
    """The denoiser, its averages and its optimizer, at the start of training."""
    torch.manual_seed(config.seed)
    denoiser = Denoiser(config.model).to(device)
    denoiser.in_bfloat16 = bfloat16
    lr_scale = denoiser.net.lr_scale
    groups = {}  # parameters by the factor on their learning rate
    for p in denoiser.parameters():
        scale = lr_scale.get(p, 1.0)
        groups.setdefault(scale, {"lr_scale": scale, "params": []})["params"].append(p)
    groups = list(groups.values())
    if config.optimizer == "muon":
        from variants.muon import MuonAndAdam
        matrices = denoiser.net.matrices
        if any(lr_scale.get(p, 1) != 1 for p in matrices):
            raise UserError("optimizer: muon's updates are alike at every width, and this variant "
                            "has rates of its own for its matrices; use adam")
        optimizer = MuonAndAdam(groups, matrices, config.matrix_rate)
    else:
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    id = experiment_id(
        config, "learning_rate", "warmup_steps", "schedule", "decay_steps", "matrix_rate")
    ema = PowerEMA(denoiser, config.ema_stds, id=id)
    return denoiser, ema, optimizer


def start_from(path, denoiser, ema, run):
    """Give a new run the averaged weights of another run, or of a snapshot, as far as they fit.
    What does not fit starts fresh and is listed in one line. Raises UserError.
    Why: what a network knows of one set of images helps it with another, so that fewer steps and
    images are enough."""
    path = Path(path)
    with reading(path, ValueError):
        snapshot = find_snapshot(path, None)
        read_info(snapshot)
    take_weights(path, snapshot, denoiser.state_dict(), run)
    force_weight_normalization(denoiser)  # rows of averages are shorter
    for average in ema.averages.values():
        average.load_state_dict(denoiser.state_dict())


def train(config, dataset, denoiser, ema, optimizer, run):
    """Take the steps that are left of a run. All processes do this; the first one writes.
    One step: draw, gradients over the micro-batches, optimizer, weights forced back to RMS 1,
    averages, then what is due. Why in this order: averages and files see only weights of RMS 1,
    and a state holds whole steps and nothing else."""
    device = next(denoiser.parameters()).device
    model = denoiser
    if world_size() > 1:
        model = DistributedDataParallel(denoiser)
        model.broadcast_buffers = False  # they are constants; torch 2.13 warns of the argument
    average = ema.averages[min(config.ema_stds)]  # the narrowest lags least behind the training
    batches = feed_micro_batches(config, dataset, run.step, device)

    for step in run.steps():
        draws = draw_step(config, dataset, step, device)
        loss, batch = accumulate_gradients(
            config, dataset.facts, model, denoiser, average, batches, draws, step)
        optimizer_step(denoiser, optimizer, learning_rate(step, config))
        ema.update(denoiser, step + 1)

        due = run.finish_step(loss)
        errors = None
        if "val" in due and dataset.holdout:
            errors = validation_errors(average, config, dataset.holdout)
        if due:
            with together():
                if rank() == 0:
                    write(run, due, denoiser, ema, batch, errors)


VALIDATION_PAIRS = 2000  # of a held-out image and noise
VALIDATION_BATCH = 50


@contextmanager
def in_float32(denoiser):
    """Run the network in float32, whatever its precision is in training."""
    before, denoiser.in_bfloat16 = denoiser.in_bfloat16, False
    try:
        yield
    finally:
        denoiser.in_bfloat16 = before


@torch.no_grad()
def validation_errors(denoiser, config, dataset):
    """The weighted error of 2,000 fixed triples of held-out image, sigma and noise, in float32: its
    means over tenths of them, by rising sigma, a list. Their mean is val_loss.

    ln sigma follows N(-0.4, 1) and is stratified: of 2,000 equally likely intervals each has one
    sigma. Why the same for every run, whatever its seed and keys: new images and noise at every
    step make a training loss too noisy to compare two runs by."""
    device = next(denoiser.parameters()).device
    # intervals go to images at random, since neighbouring images of a set are often alike
    intervals = torch.randperm(VALIDATION_PAIRS, generator=torch.Generator().manual_seed(0))
    sums = torch.zeros(10, dtype=torch.float64)
    for number in range(rank(), VALIDATION_PAIRS // VALIDATION_BATCH, world_size()):
        generator = torch.Generator().manual_seed(number)
        pairs = np.arange(VALIDATION_BATCH * number, VALIDATION_BATCH * (number + 1))
        jitter = torch.rand(VALIDATION_BATCH, generator=generator, dtype=torch.float64)
        cdf = (intervals[pairs] + jitter) / VALIDATION_PAIRS
        shape = (VALIDATION_BATCH, *dataset.shape)
        draws = {"noise": torch.randn(shape, generator=generator),
                 "posterior": torch.randn(shape, generator=generator),
                 "sigma": (torch.special.ndtri(cdf) - 0.4).exp().float(),
                 "drop": torch.zeros(VALIDATION_BATCH, dtype=torch.bool)}
        images, labels = next(dataset.feed([pairs * len(dataset) // VALIDATION_PAIRS], device))
        batch = prepare_batch(config, dataset.facts, images, labels, draws, slice(None))
        with in_float32(denoiser):
            error = weighted_error(denoiser, *batch)
        sums.index_add_(0, intervals[pairs] * 10 // VALIDATION_PAIRS, error.double().cpu())
    return [10 * total / VALIDATION_PAIRS for total in sum_over_processes(sums.tolist())]


@torch.no_grad()
def magnitudes(denoiser, images, labels, sigma, noise):
    """Mean token RMS after the first, middle and last block for a micro-batch, and RMS of the
    weights. It takes one more forward pass, not compiled. Why: the paper claims that token RMS
    stays near 1, and the log shows whether it does; MPLinear weights are forced to 1."""
    blocks, rms = denoiser.net.blocks, {}

    def watch(name):
        def record(block, inputs, tokens):
            rms[name] = tokens.float().square().mean(-1).sqrt().mean().item()

        return record

    places = {"token_rms_first": 0, "token_rms_middle": len(blocks) // 2, "token_rms_last": -1}
    hooks = [blocks[place].register_forward_hook(watch(name)) for name, place in places.items()]
    with torch.compiler.set_stance("force_eager"):  # compiled code would not call the hooks
        denoiser(images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
    for hook in hooks:
        hook.remove()
    matrices = [p for p in denoiser.parameters() if p.ndim == 2]
    count = sum(p.numel() for p in matrices)
    rms["weight_rms"] = torch.nn.utils.get_total_norm(matrices).item() / math.sqrt(count)
    return rms


def save_samples(config, facts, average, path):
    """Write a grid of ten samples of each of the first ten classes to path.png, image i from seed
    i; latents to path.npz."""
    classes = facts["classes"][:min(config.model.num_classes, 10)]  # none of an unconditional run
    labels = torch.arange(len(classes) or 1).repeat_interleave(10)
    at_once = 4 * config.micro_batch if config.micro_batch else 100  # without gradients more fit
    images = torch.cat([sample(average, facts, labels[seeds], seeds.tolist())
                        for seeds in torch.arange(len(labels)).split(at_once)])
    if facts["latent"]:
        with atomic_file(f"{path}.npz") as file:
            np.savez(file, latents=images, labels=labels)
    else:
        save_picture(make_grid(images, 10, classes), f"{path}.png")


def write(run, due, denoiser, ema, batch, errors):
    """Write what is `due` after a step: lines of the log, snapshots, samples, and a state. errors:
    from validation_errors(), or None.
    Why the state last: a run resumes from it, and everything before it must be on disk by then."""
    run.check_lock()
    config = run.config
    if "log" in due:
        gradients = [p.grad for p in denoiser.parameters() if p.ndim == 2 and p.grad is not None]
        run.log(images=run.step * config.batch,
                learning_rate=learning_rate(run.step - 1, config),  # that of the step just done
                loss=run.mean_loss,
                gradient_norm=torch.nn.utils.get_total_norm(gradients).item(),
                **magnitudes(denoiser, *batch))
    if errors:
        val_loss = sum(errors) / len(errors)
        run.log(val_loss=val_loss, error_by_sigma=errors)
        status(f"step {run.step}  val_loss {val_loss:.4f}")
    if "snapshot" in due:
        info = {"variant": config.variant, "model": asdict(config.model), "data": run.facts}
        for std, average in ema.averages.items():
            save_snapshot(run.out / "ema", average, run.step, std, info)
    if "sample" in due:
        path = run.out / "samples" / f"{run.step:07d}"
        save_samples(config, run.facts, ema.averages[max(config.ema_stds)], path)
    if "save" in due:
        run.save()


def main():
    join_processes()
    with together():
        config = load_config(TrainConfig, sys.argv[1:])
        if config.batch % (world_size() * (config.micro_batch or 1)):
            raise UserError(f"batch: {config.batch} must split evenly over {world_size()} "
                            "processes, then by micro_batch")
        dataset = load_dataset(config.dataset)
        device = choose_device(config.device)
        if dataset.facts["latent"] and config.flip:
            raise UserError("flip: a mirrored latent is not the latent of the mirrored image; "
                            "leave it out")
        channels, side, _ = dataset.shape
        with reading("model", ValueError):
            config.model = config.model.for_data(side, channels, len(dataset.facts["classes"]))
        if config.threads:
            torch.set_num_threads(config.threads)
        lock = lock_run(Path(config.out)) if rank() == 0 else None
        bfloat16 = use_bfloat16(config.precision, device)
        compiles = use_compile(config.compile, device)
        denoiser, ema, optimizer = build(config, device, bfloat16)
        if compiles:
            denoiser.net.compile()
    parts = {"weights": denoiser, "ema": ema, "optimizer": optimizer}
    run = Run(config, dataset.facts, describe, lock, parts, compiles, **provenance(device),
              precision="bfloat16" if bfloat16 else "float32")
    if config.init and run.step == 0:
        with together():
            start_from(config.init, denoiser, ema, run)
    parameters = sum(p.numel() for p in denoiser.parameters())
    print(f"{parameters:,} parameters, {len(dataset):,} images, {device.type} x {world_size()}, "
          f"steps {run.step} to {config.steps}"
          f"{'' if dataset.holdout else '; no val_loss, since no image is held out'}", flush=True)
    train(config, dataset, denoiser, ema, optimizer, run)
    if run.step == config.steps:
        print(config.out)
    leave_processes(run.exit_code())


if __name__ == "__main__":
    run_main(main)
