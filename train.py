"""Train a diffusion transformer with the EDM2 recipe: `torchrun train.py --config=configs/digits.toml`.

Source: [EDM2] Karras et al. 2024, arXiv 2312.02696. Read model.py before, ema.py and sample.py after.
Also runs as plain `python train.py`. Any key can be set on the command line: --learning_rate=0.01 --model.depth=8.
Started again with the same `out`, a run goes on from its last saved state, and ends as if it had never stopped.
"""

import dataclasses
import difflib
import fcntl
import json
import math
import os
import signal
import socket
import sys
import time
import tomllib
import typing
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import batch_indices, load_dataset, to_network
from ema import PowerEMA, atomic_file, list_snapshots, read_file, save_snapshot
from layers import force_weight_normalization, normalize_weights, project_gradients
from model import Denoiser, DiTConfig, config_class, edm2_loss, key, magnitudes
from sample import choose_device, leave_processes, sample, save_images


# ---- configuration ----

@dataclass
class TrainConfig:
    """One experiment. Raises ValueError, in one line, for impossible values."""

    out: str = key("out/run", "run directory, where everything lands")
    variant: str = key("", "an idea from variants/, by name (empty: none); --help --variant=NAME lists its own keys too")
    dataset: str = key("digits", "what to train on: a name or a path, see data.py")
    flip: bool = key(False, "mirror half of the images, at random")
    workers: int = key(2, "processes that read images ahead, for datasets that do not fit in memory")
    seed: int = key(0, "decides everything random, together with the step")
    device: str = key("", "cuda, mps or cpu (empty: the best there is)")
    threads: int = key(0, "CPU threads of a process (0: as torch chooses)")
    compile: bool = key(True, "torch.compile the network, on CUDA only")
    steps: int = key(1200, "optimizer steps")
    batch: int = key(64, "images a step, over all processes and micro-batches")
    micro_batch: int = key(0, "images at once in one process (0: its whole share of the batch)")
    learning_rate: float = key(0.01, "alpha_ref of the schedule, the rate between warm-up and decay")
    warmup_steps: int = key(0, "steps over which the rate rises linearly")
    decay_steps: int = key(0, "t_ref: after this many steps the rate falls as 1/sqrt(step) (0: never)")
    p_mean: float = key(-0.4, "mean of ln(sigma) in training")
    p_std: float = key(1.0, "standard deviation of ln(sigma) in training")
    ema_stds: tuple[float, ...] = key((0.05, 0.10), "relative widths of the averages tracked")
    log_every: int = key(50, "steps between lines of log.jsonl")
    sample_every: int = key(0, "steps between sample grids, beside the one at the end (0: none)")
    snapshot_every: int = key(0, "steps between EMA snapshots, beside the one at the end (0: none)")
    save_every: int = key(500, "steps between states to resume from, beside the one at the end")
    give_up_after: int = key(50, "steps in a row without a finite loss after which to stop")
    model: DiTConfig = dataclasses.field(default_factory=DiTConfig)

    def __post_init__(self):
        if self.seed >= 2**63:
            raise ValueError(f"seed: {self.seed} has more than 63 bits")
        for name, least in dict(seed=0, threads=0, workers=0, steps=1, batch=1, micro_batch=0, warmup_steps=0, decay_steps=0, log_every=1,
                                sample_every=0, snapshot_every=0, save_every=1, give_up_after=1).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, not {getattr(self, name)}")
        for name in ("learning_rate", "p_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be positive, not {getattr(self, name)}")
        if not self.ema_stds or len(set(self.ema_stds)) < len(self.ema_stds):
            raise ValueError(f"ema_stds: must be one or more different widths, not {list(self.ema_stds)}")
        for std in self.ema_stds:
            if not 0 < std < 12**-0.5 or round(std, 3) != std:
                raise ValueError(f"ema_stds: {std} is not between 0 and 0.289 with three decimals at most")


def config_keys(model=DiTConfig):
    """Every key of the configuration by its dotted name: {name: dataclass field}. model: the class of the network's part."""
    top = {field.name: field for field in dataclasses.fields(TrainConfig) if field.name != "model"}
    return top | {f"model.{field.name}": field for field in dataclasses.fields(model)}


def parse_text(text, kind):
    """What TOML would hold for a command-line text, lists written a,b,c; a text of another kind comes back as it is."""
    if typing.get_origin(kind) is tuple:
        return [parse_text(part, kind.__args__[0]) for part in text.strip("[]").split(",")]
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def check_type(value, kind, where):
    """A TOML value as type `kind`. Raises ValueError naming `where` if it has another one."""
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(check_type(item, kind.__args__[0], where) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or value != value:
        names = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
        raise ValueError(f"{where}: must be {names.get(kind, 'a list')}, not {value!r}")
    return value


def load_config(argv):
    """Defaults, then the TOML file of --config, then --key=value overrides. Raises ValueError, in one line."""
    values, origin, texts = {}, {}, {}
    words = iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        text = text if equals else next(words, None)
        if not name.startswith("--") or text is None:
            raise ValueError(f"{word!r} is not of the form --key=value; --help lists the keys")
        texts[name[2:]] = text
    path = texts.pop("config", None)
    if path is not None:
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--config: {path}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path}: not valid TOML: {error}") from None
        for name, value in table.items():
            values |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        origin = {name: f"{path}: {name}" for name in values}
    keys = config_keys(model := config_class(texts.get("variant", values.get("variant", ""))))
    for name, text in texts.items():
        values[name], origin[name] = parse_text(text, keys[name].type if name in keys else str), f"--{name}"
    for name in values:
        if name not in keys:
            same = [key for key in keys if key.split(".")[-1] == name.split(".")[-1]]        # right, but in the wrong table
            near = (same or difflib.get_close_matches(name, keys, n=1, cutoff=0))[0]
            raise ValueError(f"{origin[name]}: unknown key; did you mean {near!r}?")
        values[name] = check_type(values[name], keys[name].type, origin[name])

    def build(cls, prefix, **more):
        try:
            return cls(**more, **{n.removeprefix(prefix): v for n, v in values.items() if n.startswith("model.") == bool(prefix)})
        except ValueError as error:
            name, _, what = str(error).partition(": ")
            raise ValueError(f"{origin.get(prefix + name, prefix + name)}: {what}") from None

    return build(TrainConfig, "", model=build(model, "model."))


def flatten(config):
    """The configuration by dotted names: {"seed": 0, ..., "model.depth": 12, ...}."""
    top = dataclasses.asdict(config)
    model = top.pop("model")
    return top | {f"model.{name}": value for name, value in model.items()}


def save_config(config, path):
    """Write the configuration as a TOML file that `--config` takes."""
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in flatten(config).items()]
    with atomic_file(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def print_help(argv):
    variant = next((word.removeprefix("--variant=") for word in argv if word.startswith("--variant=")), "")
    keys = config_keys(config_class(variant))
    print(__doc__ + "\n  --config=FILE\n        a TOML file of the keys below, those with model. under [model]")
    for name, field in keys.items():
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
        print(f"  --{name}={default.lower() if field.type is bool else default}\n        {field.metadata['doc']}")


# ---- one step ----

def learning_rate(step, config):
    """Linear warm-up, a plateau at alpha_ref, then 1/sqrt decay [EDM2, Eq. 67]; step counts from 0."""
    rate = config.learning_rate
    if config.decay_steps:
        rate /= math.sqrt(max(step / config.decay_steps, 1))
    return rate * min(1.0, (step + 1) / (config.warmup_steps + 1))


def draw_batch(config, dataset, images, labels, step, part, device):
    """For rows `part` (a slice) of step's batch, given raw: clean images, labels after dropout, sigma and noise.

    Everything random is drawn for the whole batch from a generator seeded by (seed, step), so that it does not depend
    on how the batch is split over processes and micro-batches. Only kinds of devices differ in what they draw.
    """
    seed = int(np.random.SeedSequence((config.seed, step)).generate_state(1)[0])
    generator = torch.Generator(device).manual_seed(seed)
    shape = (config.batch, *dataset.shape)
    sigma = torch.randn(config.batch, generator=generator, device=device)[part].mul(config.p_std).add(config.p_mean).exp()
    drop = torch.rand(config.batch, generator=generator, device=device)[part] < config.model.label_dropout
    noise = torch.randn(shape, generator=generator, device=device)[part]
    if dataset.latent:                                                      # a fresh draw from the posterior
        mean, std = images.chunk(2, dim=1)
        images = mean + std * torch.randn(shape, generator=generator, device=device)[part]
    images = to_network(images, dataset.stats)
    if config.flip:
        flipped = torch.rand(config.batch, generator=generator, device=device)[part] < 0.5
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
    null = config.model.num_classes
    labels = labels.masked_fill(drop, null) if null else torch.zeros_like(labels)
    return images, labels, sigma, noise


def parts_of_batch(config, rank, processes):
    """The slices of every batch that this process works on, one after the other."""
    share = config.batch // processes
    micro = config.micro_batch or share
    return [slice(start, start + micro) for start in range(rank * share, (rank + 1) * share, micro)]


def zero_nonfinite(gradients):
    """Replace NaN and infinity by 0, as EDM2 does. Returns in how many tensors there were any, as a tensor."""
    norms = torch.stack(torch._foreach_norm(gradients))
    for gradient in gradients:
        torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0, out=gradient)
    return (~norms.isfinite()).sum()


def optimizer_step(optimizer, weights, rate):
    """One step at learning rate `rate`, under forced weight normalization of `weights`. Returns what zero_nonfinite() does."""
    nonfinite = zero_nonfinite([p.grad for group in optimizer.param_groups for p in group["params"]])
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]
    project_gradients(weights)
    optimizer.step()
    normalize_weights(weights)
    return nonfinite


# ---- what a run reports ----

def log(config, done, values):
    """Append one line to log.jsonl; nothing in it depends on the clock. What is not finite becomes null."""
    values = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
    with open(Path(config.out) / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": done, "images": done * config.batch} | values) + "\n")
        file.flush()
        os.fsync(file.fileno())                                             # a state must not outlive the log before it


def show(config, done, loss, rate):
    """The progress line, `rate` in steps per second: overwrites itself on a terminal, plain lines elsewhere."""
    left = timedelta(seconds=round((config.steps - done) / rate))
    text = f"step {done}/{config.steps}  loss {loss:.4f}  {rate * config.batch:.0f} images/s  {left} left"
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="" if done < config.steps else "\n", flush=True)
    else:
        print(text, flush=True)


# ---- the run directory ----

def lock_run(config):
    """Make the run directory and hold its lock until this process ends, however it ends. Raises ValueError if another does."""
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a+")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)                # not flock, which workers would inherit and hold
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(f"out: {out} is in use by {lock.read().strip() or 'another training'}; choose another out") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
    except OSError as error:
        raise ValueError(f"out: cannot write the run directory {out} ({error.strerror})") from None
    return lock


# what may change when a run goes on; the rest would make it another experiment
FREE = {"out", "device", "threads", "workers", "compile", "steps", "micro_batch", "learning_rate", "warmup_steps", "decay_steps", "log_every",
        "sample_every", "snapshot_every", "save_every", "give_up_after"}


def check_config(path, theirs, config):
    """Raises ValueError if the configuration a state was saved with is another experiment, naming all that differs."""
    ours = flatten(config)
    wrong = [name for name in ours if name not in FREE and theirs.get(name) != ours[name]]
    wrong = [f"{name} = {theirs.get(name)!r}, not {ours[name]!r}" for name in (["variant"] if "variant" in wrong else wrong)]
    if wrong:
        raise ValueError(f"{path}: was trained with {'; '.join(wrong)}; choose another out")


def restore(config, dataset, denoiser, ema, optimizer):
    """Take up the newest good state of the run: step 0 if there is none, or else the progress that write_state() saved.

    A state that does not load is skipped for the one before it, and why is said in "bad". Raises ValueError if all are
    bad, or if this configuration cannot go on from the good one.
    """
    out, bad = Path(config.out), {}
    for path in (out / "state.pt", out / "state-previous.pt"):
        if not path.exists():
            continue
        try:
            state = read_file(path)
            progress, theirs, data = state["progress"], state["config"], state["data"]
            json.dumps([progress, theirs, data])                            # raises TypeError for what is no plain value
            if not all(type(progress[name]) is int and 0 <= progress[name] < 2**62 for name in ("step", "since", "nonfinite")) \
                    or not isinstance(progress["loss_sum"], float) or not isinstance(theirs, dict):
                raise TypeError("its progress is no progress")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            bad[path] = str(error) if isinstance(error, ValueError) else f"{path}: not a state of a run"
            continue
        check_config(path, theirs, config)
        if data != dataset.stats:
            raise ValueError(f"{path}: was trained on data of {data}, not {dataset.stats}; choose another out")
        if progress["step"] > config.steps:
            raise ValueError(f"{path}: already trained for {progress['step']} steps; ask for more or choose another out")
        try:
            denoiser.load_state_dict(state["weights"])
            ema.load_state_dict(state["ema"])
            for group, saved in zip(optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"], strict=True):
                if other := [name for name in group if name != "lr" and saved.get(name) != group[name]]:
                    raise ValueError(f"its optimizer has another {other[0]}")
            optimizer.load_state_dict(state["optimizer"])
            for parameter in denoiser.parameters():
                if any(optimizer.state[parameter][name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                    raise ValueError("its optimizer is of another network")
                if not parameter.isfinite().all():
                    raise ValueError("its weights are not finite")
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError) as error:
            bad[path] = f"{path}: does not fit this run ({str(error).splitlines()[0]})"
            continue
        ours = flatten(config)
        changed = {name: [theirs.get(name), ours[name]] for name in sorted(FREE - {"out"}) if theirs.get(name) != ours[name]}
        return progress | {"changed": changed, "bad": {bad_path: f"{message}; going on from {path.name}, step {progress['step']}"
                                                       for bad_path, message in bad.items()}}
    if bad:
        raise ValueError(f"{'; '.join(bad.values())}; to start anew, choose another out or remove it")
    last = max((step for step, _, _ in list_snapshots(out / "ema")), default=0)
    if last > config.save_every:                                            # more than a run killed before its first state leaves
        raise ValueError(f"out: {out} has snapshots up to step {last}, but no state to go on from; choose another out or remove it")
    return {"step": 0, "since": 0, "nonfinite": 0, "loss_sum": 0.0, "changed": {}, "bad": {}}


def prepare_run(config, progress):
    """Write config.toml, and cut the log and the snapshots back to where the state stands. Raises ValueError."""
    out, step = Path(config.out), progress["step"]
    try:
        for path, message in progress["bad"].items():                       # else the next save would keep it for the good one
            print(f"warning: {message}", file=sys.stderr)
            os.replace(path, path.with_name("state-damaged.pt"))
        for path in (*out.glob("*.writing"), *out.glob("ema/*.writing"), *out.glob("samples/*.writing")):
            path.unlink()                                                   # of a process that was killed
        save_config(config, out / "config.toml")
        lines = []
        if (out / "log.jsonl").exists():
            for line in (out / "log.jsonl").read_text(errors="replace").splitlines():
                with suppress(json.JSONDecodeError):                        # one that was being written when the power went
                    lines.append(json.loads(line))
        lines = [line for line in lines if line["step"] < step or (line["step"] == step and "changed" not in line)]
        with atomic_file(out / "log.jsonl") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        for path in (*out.glob("ema/*.pt"), *out.glob("ema/posthoc/*.pt")):
            if int(path.name.split("-")[0]) > step:
                path.unlink()
        if progress["changed"]:
            log(config, step, {"changed": progress["changed"]})
    except OSError as error:
        raise ValueError(f"out: cannot write the run directory {out} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{out}: its log.jsonl or ema/ holds something else; choose another out") from None


def write_state(config, dataset, denoiser, ema, optimizer, progress):
    """Save all that `restore` needs, keeping the state before it too."""
    path = Path(config.out) / "state.pt"
    with atomic_file(path.with_name("state-next.pt")) as file:
        torch.save({"progress": progress, "config": flatten(config), "data": dataset.stats, "weights": denoiser.state_dict(),
                    "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}, file)
    if path.exists():
        os.replace(path, path.with_name("state-previous.pt"))
    os.replace(path.with_name("state-next.pt"), path)


def write_samples(config, dataset, ema, done):
    """A sample grid, always from the same seeds."""
    labels = [label for label in range(min(config.model.num_classes, 10) or 1) for _ in range(10)]
    average = ema.averages[max(config.ema_stds)]
    batch = 4 * config.micro_batch or 100                                   # without gradients more fit
    images = torch.cat(list(sample(average, dataset.stats, labels, range(len(labels)), batch)))
    save_images(images, labels, 10, samples_path(config, dataset, done))


def samples_path(config, dataset, done):
    return Path(config.out) / "samples" / f"{done:07d}{'.npz' if dataset.latent else '.png'}"


# ---- the loop ----

class Stop(Exception):
    """Ends the run with one line on stderr and an exit code; `alone` if the other processes know nothing of it yet."""

    def __init__(self, message, code=1, alone=False):
        super().__init__(message)
        self.code, self.alone = code, alone


class Signals:
    """Remembers SIGINT or SIGTERM, so that the step can be finished. A second one, more than a second later, ends at once;
    sooner it is the echo that torchrun sends after a Ctrl-C that all processes got."""

    def __init__(self):
        self.seen, self.when = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.seen and time.monotonic() - self.when > 1:
            os._exit(128 + number)
        self.seen, self.when = self.seen or number, self.when if self.seen else time.monotonic()


def build(config, device):
    """The denoiser, its averages and its optimizer, at the start of training. Raises ValueError if they cannot fit."""
    check_memory(config, device)
    torch.manual_seed(config.seed)
    denoiser = Denoiser(config.model).to(device)
    rates = denoiser.net.rates
    groups = [{"params": [p for p in denoiser.parameters() if rates.get(p, 1.0) == rate], "rate": rate} for rate in {1.0, *rates.values()}]
    return denoiser, PowerEMA(denoiser, config.ema_stds), torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)


def check_memory(config, device):
    """Raises ValueError for a model or batch that cannot fit, by a count on the low side: better now than to be killed."""
    model, images = config.model, config.micro_batch or config.batch
    tokens = (model.image_size // model.patch) ** 2
    numbers = (4 + len(config.ema_stds)) * 12 * model.depth * model.width**2 + images * tokens * model.width * model.depth * 8
    numbers += (4 + len(config.ema_stds)) * model.width * (model.num_classes + tokens) + 2 * config.batch * model.channels * model.image_size**2
    have = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * numbers > have:
        raise ValueError(f"model: of this size, with a batch of {images}, it needs at least {4 * numbers / 2**30:,.0f} GiB of memory, and "
                         f"there are {have / 2**30:,.0f}")


def train(config, dataset, device, denoiser, ema, optimizer, progress, signals, rank, processes):
    """Train from `progress` to config.steps. All processes run this; the first one writes. Raises Stop to end early."""
    weights, parameters = force_weight_normalization(denoiser), list(denoiser.parameters())
    if config.compile and device.type == "cuda":
        denoiser.net.compile()
    model, together = denoiser, None
    if processes > 1:
        model = torch.nn.parallel.DistributedDataParallel(denoiser)
        together = dist.new_group(backend="gloo")                           # to agree on things without waiting for a GPU
    if rank == 0:
        print(f"{sum(p.numel() for p in parameters):,} parameters, {len(dataset):,} images, {device.type} x {processes}"
              + (f", going on from step {progress['step']}" if progress["step"] else ""), flush=True)

    def over_processes(value, op=dist.ReduceOp.SUM):
        value = torch.tensor(value, dtype=torch.float64)
        if processes > 1:
            dist.all_reduce(value, op, together)
        return value.item()

    parts, first, since, last_good = parts_of_batch(config, rank, processes), progress["step"], progress["since"], progress["step"]
    loss_sum = torch.tensor(progress["loss_sum"] * processes if rank == 0 else 0.0, device=device)
    nonfinite, bad = torch.tensor(progress["nonfinite"], device=device), torch.zeros((), dtype=torch.long, device=device)
    clock, shown = time.monotonic(), first
    feed = dataset.feed((batch_indices(len(dataset), config.seed, step * config.batch, config.batch)[part]
                         for step in range(first, config.steps) for part in parts), device, config.workers)
    for step in range(first, config.steps):
        loss_step = torch.zeros((), device=device)
        optimizer.zero_grad(set_to_none=True)
        for part in parts:
            try:
                images, labels = next(feed)
            except ValueError as error:
                raise Stop(str(error), alone=True) from None
            batch = draw_batch(config, dataset, images, labels, step, part, device)
            if processes > 1:                                               # sum gradients over processes only once
                model.require_backward_grad_sync = part is parts[-1]
            loss = edm2_loss(model, denoiser.uncertainty, *batch) / len(parts)
            extra = denoiser.net.extra_loss(ema.averages[min(config.ema_stds)], batch[0], (config.seed, step, part.start)) / len(parts)
            (loss + extra).backward()
            loss_step += loss.detach()
        loss_sum += loss_step
        bad = torch.where(loss_step.isfinite(), 0, bad + 1)
        nonfinite += optimizer_step(optimizer, weights, learning_rate(step, config))
        ema.update(denoiser, step + 1)

        done, since = step + 1, since + 1
        stop = int(over_processes(signals.seen, dist.ReduceOp.MAX))

        def due(every):
            return done == config.steps or (every and done % every == 0)

        if due(config.log_every):
            loss = over_processes(loss_sum.item()) / processes / since
            if rank == 0:
                images, labels, sigma, noise = batch
                rms = magnitudes(denoiser, images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
                gradient_norm = torch.stack(torch._foreach_norm([p.grad for p in parameters])).norm().item()
                log(config, done, {"learning_rate": learning_rate(step, config), "loss": loss, "gradient_norm": gradient_norm, **rms,
                                   "nonfinite": nonfinite.item()})
                show(config, done, loss, (done - shown) / (time.monotonic() - clock))
            loss_sum.zero_()
            nonfinite.zero_()
            since, shown, clock = 0, done, time.monotonic()
        if due(config.log_every) or due(config.save_every) or due(config.snapshot_every) or due(config.sample_every) or stop:
            diverged = int(over_processes(bad.item(), dist.ReduceOp.MAX))
            if diverged >= config.give_up_after or (diverged and done == config.steps):
                raise Stop(f"the loss has not been finite for {diverged} steps, up to {done}; the last good state is of step {last_good}. "
                           "Try a lower learning rate from there")
            if not diverged and rank == 0 and due(config.snapshot_every):
                info = {"variant": config.variant, "model": dataclasses.asdict(config.model), "data": dataset.stats}
                for std, average in ema.averages.items():
                    save_snapshot(Path(config.out) / "ema", average, done, std, info)
            if not diverged and rank == 0 and due(config.sample_every):
                write_samples(config, dataset, ema, done)
            if not diverged and (due(config.save_every) or stop):
                last_good = done
                progress = {"step": done, "since": since, "nonfinite": nonfinite.item(), "loss_sum": over_processes(loss_sum.item()) / processes}
                if rank == 0:
                    write_state(config, dataset, denoiser, ema, optimizer, progress)
        if stop and done < config.steps:
            saved = "saved" if last_good == done else f"the last good state is of step {last_good}"
            raise Stop(f"{signal.Signals(stop).name}: stopped after step {done}, {saved}; the same command goes on", 128 + stop)


def main():
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    signals = Signals()

    def fail(error, code, alone=False):
        if rank and code == 2:
            time.sleep(2)                                                   # usually the first process says the same, and ends this one
        if rank == 0 or alone or (code == 2 and not signals.seen):
            print(("\n" if sys.stdout.isatty() and code != 2 else "") + f"train.py: {error}", file=sys.stderr, flush=True)
        if alone and processes > 1:
            os._exit(code)                                                  # an orderly end would wait for the others
        if dist.is_initialized():
            leave_processes(processes)
        sys.exit(code)

    try:
        if "--help" in sys.argv or "-h" in sys.argv:
            return print_help(sys.argv)
        config = load_config(sys.argv[1:])
        device = choose_device(config.device, int(os.environ["LOCAL_RANK"]) if processes > 1 else None)
        if config.batch % processes:
            raise ValueError(f"batch: {config.batch} is not divisible by the number of processes, {processes}")
        if config.micro_batch and config.batch // processes % config.micro_batch:
            raise ValueError(f"micro_batch: {config.micro_batch} does not divide the {config.batch // processes} images of a process")
        dataset = load_dataset(config.dataset, config.model.image_size, config.model.channels)
        config.model = config.model.fit(dataset.shape[1], dataset.shape[0], dataset.num_classes)
        if config.threads:
            torch.set_num_threads(config.threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        lock = lock_run(config) if rank == 0 else None                      # noqa: F841  held until the end
        state = build(config, device)
        progress = restore(config, dataset, *state)
        if rank == 0:
            prepare_run(config, progress)
    except ValueError as error:
        fail(error, 2)
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(config, dataset, device, *state, progress, signals, rank, processes)
        if rank == 0:
            if progress["step"] == config.steps:
                print(f"already trained for {config.steps} steps; ask for more, or choose another out")
            print(samples_path(config, dataset, config.steps))
    except Stop as stop:
        fail(stop, stop.code, stop.alone)
    except OSError as error:
        where = "the terminal" if isinstance(error, BrokenPipeError) else config.out
        fail(f"cannot write to {where} ({error.strerror}); what was saved before is intact, and the same command goes on from it", 1, True)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            fail(f"{str(error).splitlines()[0]} the same command goes on from the last saved state", 1, True)
        if processes == 1 or not any(word in str(error) for word in ("onnection", "peer", "NCCL", "gloo")):
            raise
        fail("another process died or lost its connection; the same command goes on from the last saved state", 1, True)
    leave_processes(processes)


if __name__ == "__main__":
    main()
