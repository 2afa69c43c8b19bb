"""Power-function EMA of any module's parameters, and any other width of it after training [EDM2, section 3].

The average after t steps weighs step s by s^gamma, so that its relative width `std` is a fixed share of the training so
far, however long that is. Two widths are tracked, snapshots of both kept, and every other width is put together from them
afterwards: `python ema.py out/digits --std 0.03 0.15`. This file knows nothing of diffusion and imports nothing of ours:
lift it out whole. In your own training loop:

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
0.02% for widths from 0.075 to 0.15, 0.1% at 0.03 and at 0.20. Every snapshot's rounding (0.02%) enters with its
coefficient, and narrow widths take large ones of both signs, so more snapshots do not help there: save float32 instead.
Wide ones reach back to the beginning and want early snapshots: more of them do help.

Source: [EDM2] Karras et al. 2024, arXiv 2312.02696.
"""

import argparse
import copy
import errno
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


# ---- the profile ----

def std_to_gamma(std):
    """The exponent gamma of the profile t^gamma with relative width std, 0 < std < 0.289 [EDM2, Algorithm 2]."""
    if not 0 < std < 12**-0.5:
        raise ValueError(f"an EMA width must lie between 0 and 0.289 (a plain average), not {std}")
    s = std**-2.0
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def gamma_to_std(gamma):
    """Relative width of the profile t^gamma: its standard deviation over the training length [EDM2, Eq. 123]."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def inner_products(a, b):
    """Inner products of two lists of profiles, each a pair (step, std): (len(a), len(b)), float64 [EDM2, Algorithm 3]."""
    ta, ga = np.array([(step, std_to_gamma(std)) for step, std in a]).T[:, :, None]
    tb, gb = np.array([(step, std_to_gamma(std)) for step, std in b]).T[:, None, :]
    ratio = (ta / tb) ** np.where(ta < tb, gb, -ga)
    return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * np.maximum(ta, tb))


def solve_coefficients(sources, targets):
    """How to mix `sources` so that they come closest to each of `targets`, all (step, std) [EDM2, Algorithm 3].

    Returns the coefficients, float64 (len(sources), len(targets)), each column summing to 1, and the residuals
    (len(targets),): the distance that is left between the profiles, relative to the target's norm.
    """
    A, b = inner_products(sources, sources), inner_products(sources, targets)
    norm = np.sqrt(A.diagonal())[:, None]                                   # unit profiles are better conditioned
    x = np.linalg.solve(A / (norm * norm.T), b / norm) / norm
    x /= x.sum(axis=0)
    square = inner_products(targets, targets).diagonal()
    left = square - 2 * (b * x).sum(axis=0) + (x * (A @ x)).sum(axis=0)
    return x, np.sqrt(np.maximum(left, 0) / square)


# ---- while training ----

class PowerEMA:
    """Running averages of a module, one for every relative width.

    averages: {std: a copy of the module, in eval mode, holding the average}; ready to be called.
    """

    def __init__(self, module, stds=(0.05, 0.10)):
        self.gammas = {std: std_to_gamma(std) for std in stds}
        self.averages = {std: copy.deepcopy(module).eval().requires_grad_(False) for std in stds}

    @torch.no_grad()
    def update(self, module, step):
        """Call after optimizer step `step`, counted from 1: average ← beta·average + (1 - beta)·module [EDM2, Eq. 127]."""
        parameters = list(module.parameters())
        for std, average in self.averages.items():
            beta = (1 - 1 / step) ** (self.gammas[std] + 1)
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - beta)
            for ours, theirs in zip(average.buffers(), module.buffers()):
                ours.copy_(theirs)

    def state_dict(self):
        return {std: average.state_dict() for std, average in self.averages.items()}

    def load_state_dict(self, state):
        for std, average in self.averages.items():
            average.load_state_dict(state[std])


# ---- snapshots ----

@contextmanager
def atomic_file(path):
    """A binary file to write to that appears at `path` whole, or not at all and leaves what was there."""
    beside = Path(f"{path}.{os.getpid()}.writing")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except RuntimeError as error:                                           # torch.save's word for what it could not write
        if "inline_container" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "it could not be written whole; is the disk full?") from None
    finally:
        beside.unlink(missing_ok=True)


def snapshot_path(folder, step, std):
    """folder/<step>-<std>.pt; widths have three decimals at most."""
    if round(std, 3) != std:
        raise ValueError(f"an EMA width has three decimals at most, not {std}")
    return Path(folder) / f"{step:07d}-{std:.3f}.pt"


def save_snapshot(folder, average, step, std, info=None, dtype=torch.float16):
    """Write the snapshot of a module: parameters in `dtype`, buffers as they are, and `info`, anything made of plain
    numbers, strings, lists and dicts. Returns the path."""
    path = snapshot_path(folder, step, std)
    path.parent.mkdir(parents=True, exist_ok=True)
    parameters = {name: p.detach().to("cpu", dtype) for name, p in average.named_parameters(remove_duplicate=False)}
    weights = {name: tensor.cpu() for name, tensor in average.state_dict().items()} | parameters
    buffers = [name for name in weights if name not in parameters]
    with atomic_file(path) as file:
        torch.save({"step": step, "std": std, "info": info or {}, "weights": weights, "buffers": buffers}, file)
    return path


def read_file(path):
    """torch.load without unpickling code, to the CPU. Raises ValueError naming the file if it is not whole."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except Exception as error:                                              # zip, pickle and tensor code raise all kinds
        raise ValueError(f"{path}: damaged, or no file of this kind ({type(error).__name__})") from None


def load_snapshot(path):
    """Read a snapshot: {"step", "std", "info", "weights", "buffers"}; the weights are as load_state_dict() takes them, on the
    CPU, buffers names those that are no parameters. Raises ValueError naming the file if it is not whole."""
    snapshot = read_file(path)
    kinds = {"step": int, "std": float, "info": dict, "weights": dict, "buffers": list}
    if not isinstance(snapshot, dict) or any(not isinstance(snapshot.get(name), kind) for name, kind in kinds.items()) \
            or not all(torch.is_tensor(weight) for weight in snapshot["weights"].values()):
        raise ValueError(f"{path}: not an EMA snapshot")
    return snapshot


def list_snapshots(folder):
    """The snapshots in a folder, oldest first: [(step, std, path)]."""
    names = ((path, re.fullmatch(r"(\d+)-(0\.\d+)\.pt", path.name)) for path in Path(folder).glob("*.pt"))
    return sorted((int(name[1]), float(name[2]), path) for path, name in names if name)


# ---- after training ----

@torch.no_grad()
def reconstruct(folder, stds, step=None, progress=None):
    """The averages of relative widths `stds` at `step` (None: the last), mixed from the snapshots in `folder`.

    Returns a list of snapshots like load_snapshot's, in float32, each with the "residual" of its fit and the relative error
    that "rounding" to float16 left. Reads every file once and holds one of them at a time beside the results.
    progress: called with the number of files read and of all.
    Raises ValueError, in one line, if there is no snapshot at `step` or the files do not fit together.
    """
    sources = list_snapshots(folder)
    if not sources:
        raise ValueError(f"{folder}: there are no snapshots")
    steps = sorted({s for s, _, _ in sources})
    if step is None:
        step = steps[-1]
    elif step not in steps:
        raise ValueError(f"{folder}: no snapshot at step {step}; the nearest is at {min(steps, key=lambda s: abs(s - step))}")
    sources = [source for source in sources if source[0] <= step]
    coefficients, residuals = solve_coefficients([source[:2] for source in sources], [(step, std) for std in stds])
    shapes, sums = None, None
    for number, (_, _, path) in enumerate(sources):
        snapshot = load_snapshot(path)
        parameters = {name: weight for name, weight in snapshot["weights"].items() if name not in snapshot["buffers"]}
        if sums is None:
            info, half = snapshot["info"], any(weight.dtype == torch.float16 for weight in parameters.values())
            shapes = {name: weight.shape for name, weight in parameters.items()}
            sums = [{name: torch.zeros(shape) for name, shape in shapes.items()} for _ in stds]
        if shapes != {name: weight.shape for name, weight in parameters.items()} or snapshot["info"] != info:
            raise ValueError(f"{path}: is of another model than {sources[0][2]}")
        for name, weight in parameters.items():
            weight = weight.float()
            for total, x in zip(sums, coefficients[number]):
                total[name].add_(weight, alpha=x)
        if progress:
            progress(number + 1, len(sources))
    rounding = np.linalg.norm(coefficients, axis=0) * (2e-4 if half else 0.0)               # 2e-4: that of one snapshot
    return [snapshot | {"step": step, "std": std, "weights": snapshot["weights"] | total, "residual": residual, "rounding": error}
            for std, total, residual, error in zip(stds, sums, residuals.tolist(), rounding.tolist())]


def check_fit(snapshot, bound=0.03, rounding_bound=0.005):
    """Warn on stderr about a reconstruction of a width that the snapshots could not express, or only through their rounding.

    On the digits a residual of 0.03 goes with weights 0.1 to 0.2% off, five to ten times what rounding to float16 costs
    anyway; a residual of 0.1 with 0.5 to 1%.
    """
    if snapshot.get("rounding", 0) > rounding_bound:
        print(f"warning: EMA width {snapshot['std']} takes so large a coefficient of each snapshot that their float16 leaves an error of "
              f"about {snapshot['rounding']:.1%}; save them in float32", file=sys.stderr)
    if snapshot.get("residual", 0) > bound:
        print(f"warning: EMA width {snapshot['std']} is beyond what the snapshots can express: the nearest profile they give is "
              f"{snapshot['residual']:.1%} off, trust up to {bound:.0%}; more snapshots would help", file=sys.stderr)


def save_reconstructions(folder, stds, step=None, progress=None):
    """Reconstruct, and write folder/posthoc/<step>-<std>.pt for each width. Returns [(path, snapshot)]."""
    for std in stds:
        snapshot_path(folder, 0, std)                                       # refuse a width before the work, not after
    if not list_snapshots(folder):
        raise ValueError(f"{folder}: there are no snapshots")
    saved, kept = [], Path(folder) / "posthoc"
    try:
        kept.mkdir(exist_ok=True)
        for snapshot in reconstruct(folder, stds, step, progress):
            path = snapshot_path(kept, snapshot["step"], snapshot["std"])
            with atomic_file(path) as file:
                torch.save(snapshot, file)
            saved.append((path, snapshot))
    except OSError as error:
        raise ValueError(f"{kept}: cannot be written ({error.strerror})") from None
    return saved


def find_snapshot(folder, std=None):
    """Path of the last snapshot of width `std` (None: the widest): one from training or else a reconstruction, made now and
    kept in folder/posthoc for the next time. Raises ValueError, in one line, if there is none."""
    snapshots = list_snapshots(folder)
    if not snapshots:
        raise ValueError(f"{folder}: there are no snapshots")
    std = max(width for _, width, _ in snapshots) if std is None else std
    tracked = [path for _, width, path in snapshots if width == std]
    if tracked:
        return tracked[-1]
    kept = snapshot_path(Path(folder) / "posthoc", snapshots[-1][0], std)
    if kept.exists() and kept.stat().st_mtime >= max(path.stat().st_mtime for _, _, path in snapshots):
        return kept
    return save_reconstructions(folder, [std])[0][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run directory, or a folder of snapshots")
    parser.add_argument("--std", type=float, nargs="+", required=True, help="relative widths to reconstruct, 0 to 0.289")
    parser.add_argument("--step", type=int, help="training step to reconstruct them at (default: the last snapshot's)")
    args = parser.parse_args()

    def progress(done, total):
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        if end == "\r" or done == total:
            print(f"{done}/{total} snapshots read", end=end, file=sys.stderr, flush=True)

    folder = args.folder / "ema" if (args.folder / "ema").is_dir() else args.folder
    try:
        for path, snapshot in save_reconstructions(folder, args.std, args.step, progress):
            check_fit(snapshot)
            print(path)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
