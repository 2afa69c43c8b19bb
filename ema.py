"""Power-function EMA of any module's parameters, and any other width of it after training [EDM2, section 3].

The average after t steps weights step s in proportion to s^gamma, so its relative width `std` (EDM2's EMA length) is a
fixed share of the training so far, however long. Two widths are tracked, snapshots of both kept, and any other width
is mixed from these afterwards: `python ema.py out/digits --std 0.03 0.15`. This file knows nothing of diffusion and
imports nothing of ours: lift it out whole. In your own training loop:

    ema = PowerEMA(model)                                     # widths 0.05 and 0.10
    for step in range(1, steps + 1):
        ...                                                   # one optimizer step
        ema.update(model, step)
        if step % 1000 == 0 or step == steps:                 # 20 to 50 times in all
            for std, average in ema.averages.items():
                save_snapshot("ema", average, step, std)
    for snapshot in reconstruct("ema", stds=[0.03, 0.15]):    # after training, as often as you like
        model.load_state_dict(snapshot["weights"])

What to trust, measured on the digits (relative L2 error of all weights): with 20 snapshots of each width in float16,
0.02% for widths from 0.075 to 0.15, 0.1% at 0.03 and at 0.20. Narrow widths enlarge the rounding to float16, wide ones
need early snapshots. Source: [EDM2] Karras et al. 2024, arXiv 2312.02696. Read train.py before, sample.py after.
"""

import argparse
import copy
import hashlib
import os
import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

FORMAT = 3  # of the files; in earlier ones the same weights meant something else


def std_to_gamma(std):
    """The exponent gamma of the profile t^gamma with relative width std, 0 < std < 0.289 [EDM2, Algorithm 2]."""
    if not 0.001 <= std < 12**-0.5:
        raise ValueError(f"an EMA width must lie between 0.001 and 0.288 (a plain average has 0.289), not {std}")
    s = std**-2.0
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def inner_products(a, b):
    """Inner products of two lists of profiles, pairs (step, std): (len(a), len(b)), float64 [EDM2, Algorithm 3]."""
    ta, ga = np.array([(step, std_to_gamma(std)) for step, std in a]).T[:, :, None]
    tb, gb = np.array([(step, std_to_gamma(std)) for step, std in b]).T[:, None, :]
    ratio = (ta / tb) ** np.where(ta < tb, gb, -ga)
    return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * np.maximum(ta, tb))


def solve_coefficients(sources, targets):
    """How to mix `sources` so that they come closest to each of `targets`, all (step, std) [EDM2, Algorithm 3].
    Returns the coefficients, float64 (len(sources), len(targets)), each column summing to 1, and the residuals
    (len(targets),): the distance that is left between the profiles, relative to the target's norm."""
    A, b = inner_products(sources, sources), inner_products(sources, targets)
    norm = np.sqrt(A.diagonal())[:, None]                                   # unit profiles are better conditioned
    x = np.linalg.solve(A / (norm * norm.T), b / norm) / norm
    x /= x.sum(axis=0)
    square = inner_products(targets, targets).diagonal()
    residual = square - 2 * (b * x).sum(axis=0) + (x * (A @ x)).sum(axis=0)
    return x, np.sqrt(np.maximum(residual, 0) / square)


class PowerEMA:
    """Running averages of a module, one for every relative width. Why: averaged weights draw far better images.
    averages: {std: a copy of the module in eval mode, ready to be called, that is the average, in float32 or better}"""

    def __init__(self, module, stds=(0.05, 0.10)):
        while hasattr(module, "_orig_mod") or isinstance(module, torch.nn.parallel.DistributedDataParallel):
            module = getattr(module, "_orig_mod", None) or module.module    # what torch.compile or DDP wraps
        self.step, self.gammas = 0, {std: std_to_gamma(std) for std in stds}
        self.averages = {std: copy.deepcopy(module).eval().requires_grad_(False) for std in stds}
        for average in self.averages.values():
            for p in average.parameters():                                  # bfloat16 would lose such small updates
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    @torch.no_grad()
    def update(self, module, step):
        """Call after optimizer step `step`, counted from 1; after every step, or every n-th [EDM2, Eq. 127].
        average ← beta·average + (1 - beta)·module, beta = (previous step / step)^(gamma + 1)."""
        if step <= self.step:
            raise ValueError(f"the last update was at step {self.step}, the next must be later, not {step}")
        for std, average in self.averages.items():
            ours, beta = list(average.parameters()), (self.step / step) ** (self.gammas[std] + 1)
            torch._foreach_lerp_(ours, [p.to(a.dtype) for p, a in zip(module.parameters(), ours)], 1 - beta)
            for buffer, latest in zip(average.buffers(), module.buffers()):
                buffer.copy_(latest)
        self.step = step

    def state_dict(self):
        return {"step": self.step, "averages": {std: average.state_dict() for std, average in self.averages.items()}}

    def load_state_dict(self, state):
        self.step = state["step"]
        for std, average in self.averages.items():
            average.load_state_dict(state["averages"][std])


@contextmanager
def atomic_file(path):
    """A binary file to write: when it is closed it replaces `path` whole; after an error `path` is as it was before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except RuntimeError as error:                                           # torch.save hides a full disk behind it
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    finally:
        beside.unlink(missing_ok=True)


def digest(value, sha=None):
    """SHA-256 over a tree of dicts, lists, plain values and tensors: names, types, shapes and bytes."""
    sha = sha or hashlib.sha256()
    if torch.is_tensor(value):
        if value.nbytes > value.untyped_storage().nbytes():                 # strides of 0 can claim any shape
            raise ValueError("holds a tensor larger than its storage")
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, (dict, list, tuple)):
        sha.update(f"{type(value).__name__}{len(value)}".encode())
        for part in value.items() if isinstance(value, dict) else value:
            digest(part, sha)
    else:
        sha.update(f"{type(value).__name__}{value!r};".encode())
    return sha.hexdigest()


def save_file(path, content):
    """Write a dict of plain values and tensors, with a format number and its digest."""
    with atomic_file(path) as file:
        torch.save({"format": FORMAT, "sha256": digest(content)} | content, file)


def load_file(path, mmap=False):
    """What save_file() wrote, and its "sha256", on the CPU, no code unpickled. Raises ValueError for anything else."""
    try:
        if not Path(path).is_file():                                        # opening a pipe would wait for ever
            raise ValueError("there is no such file")
        with warnings.catch_warnings(action="ignore"):                      # whatever matters is raised
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if content.pop("format", 1) != FORMAT:
            raise ValueError("was written by another version of this code; train again")
        sha256 = content.pop("sha256")
        if sha256 != digest(content):
            raise ValueError("damaged: its contents do not fit their SHA-256")
    except Exception as error:                                              # torch raises all kinds
        text = str(error) if isinstance(error, ValueError) else getattr(error, "strerror", None)
        text = text or f"damaged, or not a file of this kind ({type(error).__name__})"
        raise ValueError(f"{path}: {text}") from error
    return content | {"sha256": sha256}


def write_snapshot(folder, snapshot):
    """Write a dict of step, std, info, weights and buffers to folder/<step>-<std>.pt, and return that path."""
    path = Path(folder) / f"{snapshot['step']:07d}-{snapshot['std']:0<5}.pt"            # 0.1 as 0.100
    save_file(path, snapshot)
    return path


def save_snapshot(folder, average, step, std, info=None):
    """Write the snapshot of a module, and `info`, a dict of plain values. Returns its path. Parameters are stored in
    float16, those that it cannot hold in float32, buffers as they are."""
    weights, parameters = {}, dict(average.named_parameters(remove_duplicate=False))
    for name, tensor in average.state_dict().items():
        weights[name] = tensor.cpu().contiguous()
        if name in parameters and tensor.is_floating_point():
            full, half = weights[name].float(), weights[name].half()
            weights[name] = full if (half.float() - full).norm() > 0.01 * full.norm() else half
    buffers = [name for name in weights if name not in parameters]
    snapshot = {"step": step, "std": std, "info": info or {}, "weights": weights, "buffers": buffers}
    return write_snapshot(folder, snapshot)


def list_snapshots(folder):
    """The snapshots in a folder, oldest first: [(step, std, path)]."""
    names = ((path, re.fullmatch(r"(\d{1,15})-(0\.\d{3,})\.pt", path.name)) for path in Path(folder).glob("*.pt"))
    return sorted((int(name[1]), float(name[2]), path) for path, name in names if name)


@torch.no_grad()
def reconstruct(folder, stds, step=None):
    """The averages of relative widths `stds` at `step` (None: the last), mixed from the snapshots in `folder`.
    Returns a list of dicts as save_snapshot() writes them, with weights in float32. Snapshots stay on disk: each takes
    4 MB of memory beside the results. Warns on stderr of a width that the snapshots cannot express (on the digits, a
    residual of 0.03 goes with weights 0.1 to 0.2% off). Raises ValueError for snapshots of different models."""
    sources = list_snapshots(folder)
    steps = sorted({s for s, _, _ in sources})
    step = steps[-1] if steps and step is None else step
    if step not in steps:
        raise ValueError(f"{folder}: there is no snapshot{f' at step {step}, but at {steps[:20]}' if steps else ''}")
    sources = [source for source in sources if source[0] <= step]
    coefficients, residuals = solve_coefficients([source[:2] for source in sources], [(step, std) for std in stds])
    coefficients = torch.from_numpy(coefficients.T).float()                 # (widths, files)
    snapshots = []
    for _, _, path in sources:
        snapshots.append(load_file(path, mmap=True))
        if not {"info", "weights", "buffers"} <= snapshots[-1].keys():
            raise ValueError(f"{path}: is not a snapshot")
    last, shapes = snapshots[-1], [{name: w.shape for name, w in s["weights"].items()} for s in snapshots]
    for (_, _, path), snapshot, shape in zip(sources, snapshots, shapes):
        if shape != shapes[-1] or snapshot["info"] != last["info"]:
            raise ValueError(f"{path}: is of another model than {sources[-1][2]}")
    results = [{"step": step, "std": std, "info": last["info"], "buffers": last["buffers"],
                "weights": dict(last["weights"])} for std in stds]
    for name in shapes[-1].keys() - set(last["buffers"]):
        rows = [snapshot["weights"][name].flatten().split(2**20) for snapshot in snapshots]
        mixed = [coefficients @ torch.stack(pieces).float() for pieces in zip(*rows)]
        for i, result in enumerate(results):
            result["weights"][name] = torch.cat([piece[i] for piece in mixed]).view(shapes[-1][name])
    for std, residual in zip(stds, residuals):
        if residual > 0.03:
            print(f"warning: EMA width {std} is beyond what the snapshots can express: the nearest profile is "
                  f"{residual:.1%} off, trust up to 3%; more snapshots would help", file=sys.stderr)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run directory, or a folder of snapshots")
    parser.add_argument("--std", type=float, nargs="+", required=True, help="relative widths, 0.001 to 0.288")
    parser.add_argument("--step", type=int, help="training step to reconstruct them at (default: the last snapshot's)")
    args = parser.parse_args()
    try:
        folder = args.folder / "ema" if (args.folder / "ema").is_dir() else args.folder
        for snapshot in reconstruct(folder, args.std, args.step):
            print(write_snapshot(folder / "posthoc", snapshot), flush=True)
    except (ValueError, OSError) as error:
        parser.exit(2 if isinstance(error, ValueError) else 1, f"ema.py: {error}\n")


if __name__ == "__main__":
    main()
