"""Train a diffusion transformer with the EDM2 recipe: `torchrun train.py --config=configs/digits.toml`.

Source: [EDM2] Karras et al. 2024, arXiv 2312.02696. Read model.py before, ema.py and sample.py after.
Also runs as plain `python train.py`. Any key can be set on the command line: --learning_rate=0.01 --model.depth=8.
Started again with the same `out`, a run goes on from its last saved state.
"""

import dataclasses
import difflib
import json
import math
import os
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import batch_indices, load_dataset
from ema import PowerEMA, save_atomically, save_snapshot
from layers import force_weight_normalization, normalize_weights, project_gradients
from model import Denoiser, DiTConfig, key
from sample import choose_device, sample, save_grid


# ---- configuration ----

@dataclass
class TrainConfig:
    """One experiment. Raises ValueError, in one line, for impossible values."""

    out: str = key("out/run", "run directory, where everything lands")
    dataset: str = key("digits", "what to train on")
    seed: int = key(0, "decides everything random, together with the step")
    device: str = key("", "cuda, mps or cpu (empty: the best there is)")
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
    save_every: int = key(1000, "steps between states to resume from, beside the one at the end")
    model: DiTConfig = dataclasses.field(default_factory=DiTConfig)

    def __post_init__(self):
        for name, least in dict(seed=0, steps=1, batch=1, micro_batch=0, warmup_steps=0, decay_steps=0, log_every=1,
                                sample_every=0, snapshot_every=0, save_every=1).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, not {getattr(self, name)}")
        for name in ("learning_rate", "p_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be positive, not {getattr(self, name)}")
        for std in self.ema_stds:
            if not 0 < std < 12**-0.5:
                raise ValueError(f"ema_stds: {std} is not between 0 and 0.289")


def config_keys():
    """Every key of the configuration by its dotted name: {name: dataclass field}."""
    top = {field.name: field for field in dataclasses.fields(TrainConfig) if field.name != "model"}
    return top | {f"model.{field.name}": field for field in dataclasses.fields(DiTConfig)}


def parse_text(text, kind):
    """A command-line value as what TOML would hold; texts that do not fit come back as they are."""
    if kind in (tuple[str, ...], tuple[float, ...]):
        return [parse_text(part.strip(), kind.__args__[0]) for part in text.split(",") if part.strip()]
    if kind is bool:
        return {"true": True, "false": False}.get(text, text)
    try:
        return kind(text)
    except ValueError:
        return text


def check_type(value, kind, where):
    """`value` as type `kind`. Raises ValueError naming `where` if it has another one."""
    names = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
    if kind in (tuple[str, ...], tuple[float, ...]):
        if not isinstance(value, list):
            raise ValueError(f"{where}: must be a list, not {value!r}")
        return tuple(check_type(item, kind.__args__[0], where) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or value != value:
        raise ValueError(f"{where}: must be {names[kind]}, not {value!r}")
    return value


def load_config(argv):
    """Defaults, then the TOML file of --config, then --key=value overrides. Raises ValueError, in one line."""
    keys, options, values = config_keys(), [], {}
    for word in argv:
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals:
            raise ValueError(f"{word!r} is not of the form --key=value; --help lists the keys")
        options.append((name, text))
    path = dict(options).get("config")
    if path is not None:
        try:
            with open(path, "rb") as file:
                table = tomllib.load(file)
        except OSError as error:
            raise ValueError(f"--config: {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid TOML: {error}") from None
        for name, value in table.items():
            section = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            values |= {k: (v, f"{path}: {k}") for k, v in section.items()}
    for name, text in options:
        if name != "config":
            values[name] = (parse_text(text, keys[name].type) if name in keys else text, f"--{name}")
    for name, (value, where) in values.items():
        if name not in keys:
            near = difflib.get_close_matches(name, keys, n=1, cutoff=0)
            raise ValueError(f"{where}: unknown key; did you mean {near[0]!r}?")
        values[name] = check_type(value, keys[name].type, where)
    try:
        model = DiTConfig(**{name[6:]: value for name, value in values.items() if name.startswith("model.")})
    except ValueError as error:
        raise ValueError(f"{path or 'command line'}: model.{error}") from None
    try:
        return TrainConfig(model=model, **{name: v for name, v in values.items() if not name.startswith("model.")})
    except ValueError as error:
        raise ValueError(f"{path or 'command line'}: {error}") from None


def save_config(config, path):
    """Write the configuration as a TOML file that `--config` takes."""
    values = dataclasses.asdict(config)
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if name != "model"]
    lines += ["", "[model]"] + [f"{name} = {json.dumps(value)}" for name, value in values["model"].items()]
    Path(path).write_text("\n".join(lines) + "\n")


def print_help():
    print(__doc__)
    for name, field in config_keys().items():
        print(f"  --{name}={json.dumps(field.default)}\n        {field.metadata['doc']}")


def fit_to_dataset(model, dataset):
    """The model configuration with what the dataset decides filled in. Raises ValueError where they disagree."""
    facts = {"image_size": dataset.images.shape[-1], "channels": dataset.images.shape[1], "num_classes": dataset.num_classes}
    for name, fact in facts.items():
        value = getattr(model, name)
        if value not in (fact, DiTConfig.__dataclass_fields__[name].default) and (name, value) != ("num_classes", 0):
            raise ValueError(f"model.{name}: {value}, but the dataset has {fact}")
        if (name, value) == ("num_classes", 0):
            facts = facts | {name: 0}
    return dataclasses.replace(model, **facts)


# ---- one step ----

def learning_rate(step, config):
    """Linear warm-up, a plateau at alpha_ref, then 1/sqrt decay [EDM2, Eq. 67]; step counts from 0."""
    rate = config.learning_rate
    if config.decay_steps:
        rate /= math.sqrt(max(step / config.decay_steps, 1))
    return rate * min(1.0, (step + 1) / (config.warmup_steps + 1))


def draw_batch(config, dataset, step, part, device):
    """Rows `part` (a slice) of step's batch: clean images, labels after dropout, sigma and noise.

    Everything random is drawn for the whole batch from a generator seeded by (seed, step), so that it does not depend
    on how the batch is split over processes and micro-batches.
    """
    seed = int(np.random.SeedSequence((config.seed, step)).generate_state(1)[0])
    generator = torch.Generator(device).manual_seed(seed)
    shape = (config.batch, *dataset.images.shape[1:])
    sigma = torch.randn(config.batch, generator=generator, device=device)[part].mul(config.p_std).add(config.p_mean).exp()
    drop = torch.rand(config.batch, generator=generator, device=device)[part] < config.model.label_dropout
    noise = torch.randn(shape, generator=generator, device=device)[part]
    images, labels = dataset.batch(batch_indices(len(dataset), config.seed, step * config.batch, config.batch)[part])
    null = config.model.num_classes
    labels = labels.masked_fill(drop, null) if null else torch.zeros_like(labels)
    return images, labels, sigma, noise


def edm2_loss(model, uncertainty, images, labels, sigma, noise):
    """lambda(sigma) / exp(u(sigma)) · (D - y)² + u(sigma), averaged [EDM2, Eq. 14-16, 21].

    model(x, sigma, labels): the denoiser, perhaps wrapped. uncertainty(sigma): its u.
    """
    s = sigma.view(-1, 1, 1, 1)
    weight = (s**2 + Denoiser.sigma_data**2) / (s * Denoiser.sigma_data) ** 2
    u = uncertainty(sigma).view(-1, 1, 1, 1)
    error = model(images + s * noise, sigma, labels) - images
    return (weight / u.exp() * error**2 + u).mean()

def zero_nonfinite(gradients):
    """Replace NaN and infinity by 0, as EDM2 does. Returns in how many tensors there were any, as a tensor."""
    norms = torch.stack(torch._foreach_norm(gradients))
    for gradient in gradients:
        torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0, out=gradient)
    return (~norms.isfinite()).sum()


# ---- what a run reports ----

@torch.no_grad()
def magnitudes(denoiser, images, labels, sigma, noise):
    """Token RMS after the first, middle and last block for one batch, and RMS of all weight matrices."""
    blocks, rms = denoiser.net.blocks, {}
    watched = {"first": blocks[0], "middle": blocks[len(blocks) // 2], "last": blocks[-1]}

    def watch(name):
        return lambda block, inputs, tokens: rms.update({f"token_rms_{name}": tokens.float().square().mean(-1).sqrt().mean().item()})

    hooks = [block.register_forward_hook(watch(name)) for name, block in watched.items()]
    with torch.compiler.set_stance("force_eager"):
        denoiser(images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
    for hook in hooks:
        hook.remove()
    matrices = [p for p in denoiser.parameters() if p.ndim == 2]
    square_sum = torch.stack(torch._foreach_norm(matrices)).square().sum().item()
    return rms | {"weight_rms": math.sqrt(square_sum / sum(p.numel() for p in matrices))}


def show(text, last):
    """The progress line: overwrites itself on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
    else:
        print(text, flush=True)


def save_samples(config, dataset, ema, step):
    """A grid with one row per class (10 at most), drawn with the widest average, always from the same seeds."""
    labels = [label for label in range(min(config.model.num_classes, 10) or 1) for _ in range(10)]
    images = sample(ema.averages[max(config.ema_stds)], dataset.stats, labels, range(len(labels)))
    save_grid(images, 10, Path(config.out) / "samples" / f"{step:07d}.png")


def load_state(config, device):
    """The saved state of the run in config.out, or None. Raises ValueError if its network is another one."""
    path = Path(config.out) / "state.pt"
    if not path.exists():
        return None
    state = torch.load(path, map_location=device, weights_only=True)
    ours, theirs = dataclasses.asdict(config.model), state["model"]
    for name in ours:
        if ours[name] != theirs.get(name):
            raise ValueError(f"{path}: was trained with model.{name} = {theirs.get(name)}, not {ours[name]}; choose another out")
    return state


# ---- the loop ----

def train(config, dataset, device, state, rank, processes):
    """Train from `state` (None: from the start) to config.steps. All processes run this; the first one writes."""
    out, share = Path(config.out), config.batch // processes
    micro = config.micro_batch or share
    torch.manual_seed(config.seed)
    denoiser = Denoiser(config.model).to(device)
    weights, parameters = force_weight_normalization(denoiser), list(denoiser.parameters())
    ema = PowerEMA(denoiser, config.ema_stds)
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99), fused=True)
    loss_sum, nonfinite, first = torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device), 0
    if state:
        denoiser.load_state_dict(state["weights"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        loss_sum, nonfinite, first = state["loss_sum"], state["nonfinite"], state["step"]
    if config.compile and device.type == "cuda":
        denoiser.net.compile()
    model = torch.nn.parallel.DistributedDataParallel(denoiser, broadcast_buffers=False) if processes > 1 else denoiser
    if rank == 0:
        print(f"{sum(p.numel() for p in parameters):,} parameters, {len(dataset):,} images, {device.type}, {processes} process(es)")
    begin, begin_step = time.monotonic(), first

    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        for start in range(rank * share, (rank + 1) * share, micro):
            batch = draw_batch(config, dataset, step, slice(start, start + micro), device)
            if processes > 1:
                model.require_backward_grad_sync = start + micro == (rank + 1) * share
            loss = edm2_loss(model, denoiser.uncertainty, *batch) * (micro / share)
            loss.backward()
            loss_sum += loss.detach()
        nonfinite += zero_nonfinite([p.grad for p in parameters])
        project_gradients(weights)
        optimizer.step()
        normalize_weights(weights)
        optimizer.zero_grad(set_to_none=True)
        done, last = step + 1, step + 1 == config.steps
        ema.update(denoiser, done)

        if done % config.log_every == 0 or last:
            if processes > 1:
                dist.all_reduce(loss_sum)
            loss = loss_sum.item() / processes / ((done - 1) % config.log_every + 1)
            loss_sum.zero_()
            if rank == 0:
                line = {"step": done, "images": done * config.batch, "loss": loss, "learning_rate": learning_rate(step, config)}
                line |= magnitudes(denoiser, *batch) | {"nonfinite": nonfinite.item()}
                with open(out / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                rate = (done - begin_step) / (time.monotonic() - begin)
                left = time.strftime("%H:%M:%S", time.gmtime((config.steps - done) / rate))
                show(f"step {done}/{config.steps}  loss {loss:.4f}  {rate * config.batch:.0f} images/s  {left} left", last)
        if rank == 0:
            if (config.snapshot_every and done % config.snapshot_every == 0) or last:
                info = {"model": dataclasses.asdict(config.model), "data": dataset.stats}
                for std, average in ema.averages.items():
                    save_snapshot(out / "ema", average, done, std, info)
            if (config.sample_every and done % config.sample_every == 0) or last:
                save_samples(config, dataset, ema, done)
            if done % config.save_every == 0 or last:
                save_atomically({"step": done, "model": dataclasses.asdict(config.model), "weights": denoiser.state_dict(),
                                 "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                                 "loss_sum": loss_sum, "nonfinite": nonfinite}, out / "state.pt")


def main():
    if "--help" in sys.argv or "-h" in sys.argv:
        return print_help()
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        config = load_config(sys.argv[1:])
        device = choose_device(config.device)
        if config.batch % processes or (config.micro_batch and config.batch // processes % config.micro_batch):
            raise ValueError(f"batch: {config.batch} does not split over {processes} process(es) by micro_batch = {config.micro_batch}")
        dataset = load_dataset(config.dataset)
        config.model = fit_to_dataset(config.model, dataset)
        state = load_state(config, device)
        if rank == 0:
            Path(config.out).mkdir(parents=True, exist_ok=True)
            save_config(config, Path(config.out) / "config.toml")
            log = Path(config.out) / "log.jsonl"
            lines = log.read_text().splitlines(keepends=True) if state else []
            log.write_text("".join(line for line in lines if json.loads(line)["step"] <= state["step"]))
    except (ValueError, OSError) as error:
        if rank == 0:
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(config, dataset.to(device), device, state, rank, processes)
    if rank == 0:
        print(f"done: {Path(config.out) / 'samples' / f'{config.steps:07d}.png'}")
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
