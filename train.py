"""Train a diffusion transformer with the EDM2 recipe: `python train.py --config=configs/digits.toml`.

Source: [EDM2] Karras et al. 2024, arXiv 2312.02696. Read model.py before, ema.py and sample.py after.
`torchrun --nproc_per_node=8 train.py` trains on eight GPUs. Any key can be set on the command line: --model.depth=8.
Started again with the same `out`, a run goes on from its last saved state, and ends as if it had never stopped.
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import signal
import sys
import time
import tomllib
import typing
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from data import (Parser, UserError, batch_indices, describe, differences, load_dataset, make_grid, reading, regular,
                  run_main, say, to_network)
from ema import PowerEMA, atomic_file, list_snapshots, load_file, save_file, save_snapshot
from layers import force_weight_normalization
from model import Configuration, Denoiser, DiTConfig, check_value, config_class, edm2_loss, key, magnitudes
from sample import (PRECISIONS, check_compiler, choose_device, exchange, gather, join_processes, leave_processes,
                    sample, save_picture, together, use_bfloat16)


@dataclass
class TrainConfig(Configuration):
    """One experiment. Raises ValueError that begins with the name of the key."""

    out: str = key("out/run", "run directory, where everything lands")
    variant: str = key("", "an idea from variants/, by name (empty: none); --help --variant=NAME lists its keys too")
    dataset: str = key("digits", "what to train on: the name or directory of a set that data.py prepared")
    flip: bool = key(False, "mirror half of the images, at random")
    seed: int = key(0, "random seed; with the step number it determines all random draws", 0, 2**63 - 1)
    device: str = key("", "cuda, mps or cpu (empty: the best there is)")
    threads: int = key(0, "CPU threads of a process (0: as torch chooses)", 0, 256)
    precision: str = key("auto", "of the network: float32, bfloat16 or auto, which is bfloat16 on GPUs that have it",
                         choices=PRECISIONS)
    compile: str = key("auto", "torch.compile the network: true, false or auto, which is true on CUDA",
                       choices=("auto", "true", "false"))
    steps: int = key(1200, "optimizer steps", 1, 10**9)
    batch: int = key(64, "images a step, over all processes and micro-batches", 1, 10**6)
    micro_batch: int = key(0, "images at once in one process (0: its whole share of the batch)", 0, 10**6)
    learning_rate: float = key(0.01, "alpha_ref of the schedule, the rate between warm-up and decay", 1e-9, 1e3)
    warmup_steps: int = key(0, "steps over which the rate rises linearly", 0, 10**9)
    decay_steps: int = key(0, "t_ref: after this many steps the rate falls as 1/sqrt(step) (0: never)", 0, 10**9)
    p_mean: float = key(-0.4, "mean of ln(sigma) in training: higher for layout and shape, lower for detail", -20, 20)
    p_std: float = key(1.0, "standard deviation of ln(sigma) in training", 1e-3, 20)
    ema_stds: tuple[float, ...] = key((0.05, 0.10), "relative widths of the averages tracked", 0.001, 0.288)
    val_every: int = key(500, "steps between values of val_loss (0: only one, at the end)", 0, 10**9)
    log_every: int = key(50, "steps between lines of log.jsonl", 1, 10**9)
    sample_every: int = key(0, "steps between sample grids (0: only one, at the end)", 0, 10**9)
    snapshot_every: int = key(0, "steps between EMA snapshots (0: only at the end)", 0, 10**9)
    save_every: int = key(500, "steps between states to resume from; the last step always saves one", 1, 10**9)
    model: DiTConfig = field(default_factory=DiTConfig)

    def __post_init__(self):
        super().__post_init__()
        if len({round(std, 3) for std in self.ema_stds}) < len(self.ema_stds):
            raise ValueError(f"ema_stds: {list(self.ema_stds)} must differ in three decimals")


# keys that may change when a run goes on (any other change is another experiment), and that processes may differ in
RESUMABLE = {"out", "dataset", "device", "threads", "precision", "compile", "steps", "micro_batch", "learning_rate",
             "warmup_steps", "decay_steps", "val_every", "log_every", "sample_every", "snapshot_every", "save_every"}
LOCAL = ("out", "dataset", "device", "threads")


def parse_text(text, kind):
    """A word of the command line as TOML would give it: numbers, true and false, lists written a,b,c; else the text."""
    if typing.get_origin(kind) is tuple:
        return [parse_text(part.strip(), kind.__args__[0]) for part in text.strip("[]").split(",")]
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        return text


def add_options(parser, Class, prefix=""):
    """An option for each key of a configuration class. Returns the dataclass fields by the names of their options."""
    keys = {f"{prefix}{f.name}": f for f in fields(Class) if f.metadata}
    for name, f in keys.items():
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        text = f"{f.metadata['doc']} [{default}]".replace("%", "%%")         # which argparse would format
        parser.add_argument(f"--{name}", metavar="", default=argparse.SUPPRESS, help=text)
    return keys


def load_config(argv):
    """Defaults, then the TOML file of --config, then --key=value. Raises UserError that names the key and the file."""
    parser, table = Parser(__doc__), {}
    parser.add_argument("--config", metavar="FILE", help="a TOML file of these keys, those with model. under [model]")
    keys = add_options(parser, TrainConfig)
    first, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    if first.config:
        with reading(first.config):
            table = tomllib.loads(regular(first.config).read_text(encoding="utf-8-sig"))
            model = table.pop("model", {})
            if not isinstance(model, dict):
                raise ValueError("model must be a table, [model]")
            table |= {f"model.{name}": value for name, value in model.items()}
    with reading("--variant" if "variant" in first else first.config, ValueError):
        Model = config_class(getattr(first, "variant", table.get("variant", "")))
    keys |= add_options(parser, Model, "model.")                            # a variant has more of them
    given, unknown = parser.parse_known_args(argv)
    given = {name: parse_text(text, keys[name].type) for name, text in vars(given).items() if name != "config"}

    unknown = [word.split("=")[0] for word in unknown]
    for name in (*unknown, *(table.keys() - keys.keys())):
        known = {full.split(".")[-1]: full for full in ("config", *keys)}   # the right key may be in the other table
        near = [known[last] for last in difflib.get_close_matches(name.lstrip("-").split(".")[-1], known)]
        near = [f"config={name}"] if name.endswith(".toml") else near
        near = [f"--{full}" if name in unknown else full for full in near]
        hint = "see --help" + "; keys of a variant need --variant=NAME" * (Model is DiTConfig)
        hint = f"did you mean {near[0]!r}?" if near else hint
        raise UserError(f"{'' if name in unknown else f'{first.config}: '}{name[:300]}: unknown key; {hint}")
    for where, values in ((first.config, table), ("command line", given)):
        with reading(where):
            for name, value in values.items():
                check_value(name, value, keys[name].type, *keys[name].metadata["bounds"])
    with reading("configuration", ValueError):
        values = table | given
        model = Model(**{name[6:]: values.pop(name) for name in list(values) if name.startswith("model.")})
        return TrainConfig(model=model, **values)


def flatten(config):
    """The configuration by dotted names: {"seed": 0, ..., "model.depth": 12, ...}."""
    top = asdict(config)
    model = top.pop("model")
    return top | {f"model.{name}": value for name, value in model.items()}


def learning_rate(step, config):
    """Linear warm-up, a plateau at alpha_ref, then 1/sqrt decay [EDM2, Eq. 67]; step counts from 0."""
    warmup = min((step + 1) / (config.warmup_steps + 1), 1)
    decay = max(step / config.decay_steps, 1) if config.decay_steps else 1
    return config.learning_rate / math.sqrt(decay) * warmup


def make_generator(config, number, device):
    """Generator `number` of a run. Why hash + number: a seed has 32 bits, and no two generators may coincide."""
    start = int.from_bytes(hashlib.sha256(str(config.seed).encode()).digest()[:4], "big")
    return torch.Generator(device).manual_seed((start + number) % 2**32)


def draw_step(config, dataset, step, device):
    """All random numbers of a step, by name, each a tensor (batch, ...).
    Why for the whole batch: they do not depend on how it is split over processes and micro-batches."""
    options = {"generator": make_generator(config, step, device), "device": device}
    draws = {"sigma": torch.randn(config.batch, **options).mul(config.p_std).add(config.p_mean).exp(),
             "drop": torch.rand(config.batch, **options) < config.model.label_dropout,
             "noise": torch.randn(config.batch, *dataset.shape, **options)}
    if dataset.facts["latent"]:
        draws["posterior"] = torch.randn(config.batch, *dataset.shape, **options)
    if config.flip:
        draws["flip"] = torch.rand(config.batch, 1, 1, 1, **options) < 0.5
    return draws


def prepare_batch(config, facts, images, labels, draws, part):
    """What edm2_loss takes of rows `part` (a slice) of a step: clean images, labels after dropout, sigma and noise.
    images, labels: these rows as the dataset has them. draws: of the whole step."""
    draws = {name: draw[part].to(images.device) for name, draw in draws.items()}
    if facts["latent"]:                                                     # a fresh draw from the VAE's posterior
        mean, std = images.chunk(2, dim=1)
        images = mean + std * draws["posterior"]
    images = to_network(images, facts)
    if "flip" in draws:
        images = torch.where(draws["flip"], images.flip(-1), images)
    null = config.model.num_classes
    labels = labels.masked_fill(draws["drop"], null) if null else torch.zeros_like(labels)
    return images, labels, draws["sigma"], draws["noise"]


def sum_over_processes(values, processes):
    """The sums of some numbers over all processes."""
    return sum(gather(torch.tensor(values, dtype=torch.float64), processes)).tolist()


@torch.no_grad()
def validation_loss(denoiser, config, dataset, rank=0, processes=1):
    """The EDM-weighted error, without u, on 2,000 pairs of a held-out image and noise, always in float32; ln sigma is
    stratified over N(-0.4, 1). Why the same pairs for every run, whatever its seed and keys: new images and noise at
    every step make a training loss too noisy to compare two runs by."""
    device, errors = next(denoiser.parameters()).device, []
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    bfloat16, denoiser.in_bfloat16 = denoiser.in_bfloat16, False
    for part in range(rank, 40, processes):
        pairs, generator = np.arange(50 * part, 50 * (part + 1)), torch.Generator().manual_seed(part)
        cdf = (order[pairs] + torch.rand(50, generator=generator, dtype=torch.float64)) / 2000
        draws = {name: torch.randn(50, *dataset.shape, generator=generator) for name in ("noise", "posterior")}
        draws |= {"sigma": (torch.special.ndtri(cdf) - 0.4).exp().float(), "drop": torch.zeros(50, dtype=torch.bool)}
        (images, labels), = dataset.feed([pairs * len(dataset) // 2000], device)
        batch = prepare_batch(config, dataset.facts, images, labels, draws, slice(None))
        errors.append(edm2_loss(denoiser, torch.zeros_like, *batch).item())
    denoiser.in_bfloat16 = bfloat16
    return sum_over_processes([sum(errors)], processes)[0] / 40


def optimizer_step(denoiser, optimizer, rate):
    """One step of Adam at `rate`, then forced weight normalization. Gradients that are not finite count as 0 [EDM2]."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        for p in group["params"]:
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0.0, posinf=0.0, neginf=0.0, out=p.grad)
    optimizer.step()
    force_weight_normalization(denoiser)


def lock_run(out):
    """Make the run directory and hold its lock while this process lives. Why: two trainings would mix their files."""
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        import fcntl
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"out: {out} is in use by another training; choose another out") from None
    except (OSError, ImportError):                                          # a disk without locks, or Windows
        say(f"warning: {out} cannot be locked; start one training in it at a time")
    return lock


def read_state(config, facts, denoiser, ema, optimizer):
    """Load the newest good state of the run into what build() made. Returns the rest of it (step, losses, sha256,
    config), or that of a run at step 0, and under "damaged" what is wrong with a newer state."""
    out, damaged = Path(config.out), []
    for path in filter(os.path.lexists, (out / "state.pt", out / "state-previous.pt")):
        try:
            state = load_file(path)
            break
        except ValueError as error:                                         # the one before it may be good
            damaged.append(str(error))
    else:
        last = max((step for step, _, _ in list_snapshots(out / "ema")), default=0)
        if last > config.save_every:                                        # a run killed before its first save: fewer
            damaged.append(f"{out} has snapshots up to step {last}, but no state to go on from")
        if damaged:
            raise UserError(f"{'; '.join(damaged)}; choose another out")
        return {"step": 0, "losses": [0.0] * 3, "sha256": "", "config": flatten(config), "damaged": []}

    with reading(path):
        if state["config"]["variant"] == config.variant:
            # a key that is newer than the run has its default, which may follow from keys that the run has
            model = {name: state["config"][f"model.{name}"] for name in asdict(config.model)
                     if f"model.{name}" in state["config"]}
            state["config"] = flatten(TrainConfig(model=type(config.model)(**model))) | state["config"]
        wrong = differences(state["config"], flatten(config), RESUMABLE)
        other = [name for name, sha in facts["hashes"].items() if state["data"]["hashes"][name] != sha]
        if wrong or other:
            wrong = wrong or f"other {' and '.join(other)}: {describe(state['data'])}; not {describe(facts)}"
            raise ValueError(f"was trained with {wrong}; choose another out")
        if state["step"] > config.steps:
            raise ValueError(f"already trained for {state['step']} steps; ask for more or choose another out")
        denoiser.load_state_dict(state["weights"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        return {name: state[name] for name in ("step", "losses", "sha256", "config")} | {"damaged": damaged}


def log(out, values):
    """Append one line to log.jsonl, on disk before a later state is; nothing in it depends on the clock."""
    with open(out / "log.jsonl", "a") as file:
        print(json.dumps(values), file=file, flush=True)
        os.fsync(file.fileno())


def prepare_run(config, state):
    """Write config.toml, and cut the log and the snapshots back to where the state stands."""
    out, step = Path(config.out), state["step"]
    if state["damaged"]:                                                    # else it would become state-previous.pt
        say(f"warning: {state['damaged'][0]}; going on from step {step}")
        os.replace(out / "state.pt", out / "state-damaged.pt")
    names = ("state-next*", "config*", "log*", "ema/*", "samples/*")
    unfinished = [path for name in names for path in out.glob(f"{name}.writing")]       # by a training that was killed
    for path in unfinished + [path for later, _, path in list_snapshots(out / "ema") if later > step]:
        path.unlink()
    with atomic_file(out / "config.toml") as file:
        for name, value in flatten(config).items():
            file.write(f"{name} = {json.dumps(value, ensure_ascii=False)}\n".encode())
    (out / "log.jsonl").touch()
    with reading(out / "log.jsonl"):
        lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
        lines = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        lines = [line for line, values in lines if values["step"] + ("changed" in values) <= step]
    with atomic_file(out / "log.jsonl") as file:
        file.write("".join(lines).encode())
    if changed := differences(flatten(config), state["config"], LOCAL):
        log(out, {"step": step, "changed": changed})
        print(f"changed since the last training: {changed}", flush=True)


def save_samples(config, facts, average, done):
    """Write a grid of ten samples of each of the first ten classes, always of the same seeds; latents as npz."""
    classes = facts["classes"][:min(config.model.num_classes, 10)]          # none of an unconditional run
    labels = torch.arange(len(classes) or 1).repeat_interleave(10)
    parts = torch.arange(len(labels)).split(4 * config.micro_batch or 100)  # without gradients more fit
    images = torch.cat([sample(average, facts, labels[part], part.tolist()) for part in parts])
    path = Path(config.out) / "samples" / f"{done:07d}"
    if facts["latent"]:
        with atomic_file(f"{path}.npz") as file:
            np.savez(file, latents=images, labels=labels)
    else:
        save_picture(make_grid(images, 10, classes), f"{path}.png")


def build(config, device, bfloat16=False):
    """The denoiser, its averages and its optimizer, at the start of training."""
    torch.manual_seed(config.seed)
    denoiser, groups = Denoiser(config.model).to(device), {}
    denoiser.in_bfloat16, scales = bfloat16, denoiser.net.lr_scale
    for p in denoiser.parameters():
        scale = scales.get(p, 1.0)
        groups.setdefault(scale, {"lr_scale": scale, "params": []})["params"].append(p)
    optimizer = torch.optim.Adam(list(groups.values()), betas=(0.9, 0.99), fused=True)
    return denoiser, PowerEMA(denoiser, config.ema_stds), optimizer


def catch_signals(processes):
    """A list that fills when SIGTERM or Ctrl-C asks to stop, so that the step can be finished and saved. A second
    signal ends the process at once, except under torchrun, which sends every process a Ctrl-C that it already got."""
    asked = []

    def receive(number, frame):
        asked.append(number)
        if processes == 1:
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    return asked


def due(done, config):
    """What is due after `done` steps, at the end all of it: a set of log, val, snapshot, sample and save."""
    every = {name: getattr(config, f"{name}_every") for name in ("log", "val", "snapshot", "sample", "save")}
    return {name for name, steps in every.items() if done == config.steps or steps and done % steps == 0}


def show(text, stays=True):
    """Print a line on stdout. On a terminal the next one overwrites it, unless it `stays`."""
    terminal = sys.stdout.isatty()
    print(f"\r\033[K{text}" if terminal else text, end="" if terminal and not stays else "\n", flush=True)


def write(tasks, config, facts, denoiser, ema, optimizer, lock, done, batch, losses, val_loss):
    """Write what is due after `done` steps (`tasks`, from due()): lines of the log, snapshots, samples, and a state,
    keeping the one before it. losses: their sum, how many were finite and how many not since the last log line.
    Why the state last: a run goes on from it, and everything before it must be on disk by then."""
    out, (total, count, skipped) = Path(config.out), losses
    if not ((out / "lock").exists() and os.path.samestat(os.fstat(lock), os.stat(out / "lock"))):
        raise OSError(f"{out} was deleted or moved, and another training may have its place")
    if "log" in tasks:
        images, labels, sigma, noise = batch
        rms = magnitudes(denoiser, images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
        gradients = [p.grad for p in denoiser.parameters() if p.ndim == 2 and p.grad is not None]
        log(out, {"step": done, "images": done * config.batch, "learning_rate": learning_rate(done - 1, config),
                  "loss": total / count, "gradient_norm": torch.nn.utils.get_total_norm(gradients).item(), **rms})
        if skipped:
            say(f"warning: up to step {done}, {skipped:g} losses were not finite; such a step has no gradient")
        losses = [0.0] * 3
    if val_loss is not None:
        log(out, {"step": done, "val_loss": val_loss})
        show(f"step {done}  val_loss {val_loss:.4f}")
    if "snapshot" in tasks:
        info = {"variant": config.variant, "model": asdict(config.model), "data": facts}
        for std, average in ema.averages.items():
            save_snapshot(out / "ema", average, done, std, info)
    if "sample" in tasks:
        save_samples(config, facts, ema.averages[max(config.ema_stds)], done)
    if "save" in tasks:
        save_file(out / "state-next.pt", {
            "step": done, "losses": losses, "config": flatten(config), "data": facts,
            "weights": denoiser.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()})
        if (out / "state.pt").exists():
            os.replace(out / "state.pt", out / "state-previous.pt")
        os.replace(out / "state-next.pt", out / "state.pt")


def train(config, dataset, device, denoiser, ema, optimizer, state, lock, rank, processes):
    """Train from state["step"] to config.steps. All processes run this; the first one writes.
    One step: draw, gradients over the micro-batches, Adam, weights forced back to RMS 1, averages, then what is due.
    Why in this order: averages and files see only weights of RMS 1, and a state holds whole steps and nothing else."""
    facts, first = dataset.facts, state["step"]
    share, narrowest = config.batch // processes, ema.averages[min(config.ema_stds)]
    micro = config.micro_batch or share
    parts = [slice(start, start + micro) for start in range(rank * share, (rank + 1) * share, micro)]
    batches = dataset.feed((batch_indices(len(dataset), config.seed, step * config.batch, config.batch)[part]
                            for step in range(first, config.steps) for part in parts), device)
    model = DistributedDataParallel(denoiser) if processes > 1 else denoiser
    compiles = config.compile == "true" or config.compile == "auto" and device.type == "cuda"
    if compiles:
        denoiser.net.compile()
    losses = torch.tensor([*state["losses"], 0.0][:3], device=device)       # since the last log line: see write()
    asked, clock, shown = catch_signals(processes), time.monotonic(), first

    for step in range(first, config.steps):
        done, tasks, loss_step = step + 1, due(step + 1, config), 0.0
        draws = draw_step(config, dataset, step, device)
        optimizer.zero_grad()
        for part in parts:
            images, labels, sigma, noise = prepare_batch(config, facts, *next(batches), draws, part)
            if processes > 1:                                               # sum gradients over processes only once
                model.require_backward_grad_sync = part is parts[-1]
            number = 2**31 + (step * config.batch + part.start) // micro     # draw_step() has those below
            generator = make_generator(config, number, device)
            torch.manual_seed(hash((config.seed, number)))                  # for a variant's dropout and the like
            loss = edm2_loss(model, denoiser.uncertainty, images, labels, sigma, noise) / len(parts)
            extra = denoiser.net.extra_loss(narrowest, images, generator) / len(parts)
            ((loss + extra) * images[0].numel()).backward()                 # a sum over pixels, as EDM2's
            loss_step += loss.detach()

        optimizer_step(denoiser, optimizer, learning_rate(step, config))
        ema.update(denoiser, done)
        finite = loss_step.isfinite().float()
        losses += torch.stack([loss_step.nan_to_num(0.0, 0.0, 0.0), finite, 1 - finite])

        # show progress; the time to compile, to validate and to write counts neither as spent nor as left
        if compiles and step == first:
            show(f"the first step, which compiles the network, took {time.monotonic() - clock:.0f} s")
            clock, shown = time.monotonic(), done
        elif "log" in tasks or time.monotonic() - clock > 10:
            mean = (losses[0] / losses[1]).item()                           # which waits for the GPU
            rate = (done - shown) / max(time.monotonic() - clock, 1e-9)     # clocks can be coarse
            show(f"step {done}/{config.steps}  loss {mean:.4f}  {rate * config.batch:.0f} images/s  "
                 f"{timedelta(seconds=round((config.steps - done) / rate))} left", done == config.steps)
            clock, shown = time.monotonic(), done

        # agree on what is due, check the loss, write
        stop = sum_over_processes([len(asked)], processes)[0] > 0
        if stop:
            tasks.add("save")
        if not tasks:
            continue
        total, count, skipped, latest = sum_over_processes([*losses.tolist(), loss_step.item()], processes)
        if not math.isfinite(latest):
            raise UserError("" if rank else f"the loss of step {done} is not finite; the last saved state is good, go "
                            "on from it with a lower learning rate")
        val_loss, begin = None, time.monotonic()
        if dataset.holdout and "val" in tasks:
            val_loss = validation_loss(narrowest, config, dataset.holdout, rank, processes)
        with together(processes):
            if rank == 0:
                write(tasks, config, facts, denoiser, ema, optimizer, lock, done, (images, labels, sigma, noise),
                      [total / processes, count / processes, skipped / processes], val_loss)
        if "log" in tasks:
            losses.zero_()
        clock += time.monotonic() - begin
        if stop and done < config.steps:
            show(f"stopped after step {done}, saved; the same command goes on")
            leave_processes(processes, 128 + (asked or [signal.SIGTERM])[0])


def main():
    rank, processes = join_processes()
    with together(processes):
        config = load_config(sys.argv[1:])
        if config.batch % (processes * (config.micro_batch or 1)):
            raise UserError(f"batch: {config.batch} must split evenly over {processes} processes, then by micro_batch")
        dataset, device = load_dataset(config.dataset), choose_device(config.device)
        if dataset.facts["latent"] and config.flip:
            raise UserError("flip: a mirrored latent is not the latent of the mirrored image; leave it out")
        with reading("model", ValueError):
            config.model = config.model.for_data(dataset.shape[1], dataset.shape[0], len(dataset.facts["classes"]))
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.compile == "true":
            check_compiler(device)
        lock = lock_run(Path(config.out)) if rank == 0 else None
        built = build(config, device, use_bfloat16(config.precision, device))
        state = read_state(config, dataset.facts, *built)
    with together(processes):                                               # all start from the same state, or none
        ours = flatten(config) | dataset.facts["hashes"] | {"step": state["step"], "state": state["sha256"]}
        for number, text in enumerate(exchange(json.dumps(ours), processes)):
            if wrong := differences(json.loads(text), json.loads(json.dumps(ours)), LOCAL):
                raise UserError(f"process {number} has {wrong}")
        if rank == 0:
            prepare_run(config, state)
    print(f"{sum(p.numel() for p in built[0].parameters()):,} parameters, {len(dataset):,} images, "
          f"{device.type} x {processes}, steps {state['step']} to {config.steps}"
          f"{'' if dataset.holdout else '; no val_loss, since no image is held out'}", flush=True)
    train(config, dataset, device, *built, state, lock, rank, processes)
    print(config.out)
    leave_processes(processes)


if __name__ == "__main__":
    run_main(main)
