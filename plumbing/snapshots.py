"""Snapshots of averages on disk, <folder>/<step>-<std>.pt, from which ema.py mixes other widths. Each is a dict of
step, std, info (plain values, whatever its owner needs), training (which one it comes from), weights, and buffers, the
names of those that are not averaged."""

import re
from pathlib import Path

import torch

from plumbing.files import load_file, save_file


def write_snapshot(folder, snapshot):
    """Write a snapshot as it is to folder/<step>-<std>.pt, and return that path."""
    path = Path(folder) / f"{snapshot['step']:07d}-{snapshot['std']:0<5}.pt"  # 0.1 as 0.100
    save_file(path, snapshot)
    return path


def save_snapshot(folder, average, step, std, info=None):
    """Write the snapshot of a module, and `info`, a dict of plain values. Returns its path. Parameters are stored in
    float16, those that it cannot hold in float32; buffers, and what PowerEMA never averages, as they are. Raises
    ValueError for what could not be loaded again."""
    known = vars(average).get("_power_ema", {"training": "", "frozen": []})
    averaged = {id(p) for name, p in average.named_parameters() if name not in known["frozen"]}
    weights, buffers = {}, []
    for name, tensor in average.state_dict(keep_vars=True).items():
        if not torch.is_tensor(tensor):  # an extra state
            weights[name] = tensor
            buffers.append(name)
            continue
        weights[name] = tensor.detach().cpu().contiguous()
        if id(tensor) not in averaged:  # by identity: wrappers change names in the state_dict
            buffers.append(name)
        elif tensor.is_floating_point():
            full = weights[name].float()
            half = full.half()
            weights[name] = full if (half.float() - full).norm() > 0.01 * full.norm() else half
    return write_snapshot(folder, {"step": int(step), "std": float(std), "info": info or {},
                                   "training": known["training"], "weights": weights, "buffers": buffers})


def list_snapshots(folder):
    """The snapshots in a folder, oldest first: [(step, std, path)]."""
    names = ((path, re.fullmatch(r"(\d{1,15})-(0\.\d{3,})\.pt", path.name)) for path in Path(folder).glob("*.pt"))
    return sorted((int(name[1]), float(name[2]), path) for path, name in names if name)


def load_snapshots(folder, step=None):
    """The snapshots in a folder up to `step` (None: the last one's), oldest first, as ema.reconstruct() takes them.
    Their weights stay on disk until they are used. Raises ValueError if there is none at that step."""
    found = list_snapshots(folder)
    steps = sorted({saved for saved, _, _ in found})
    step = steps[-1] if steps and step is None else step
    if step not in steps:
        raise ValueError(f"{folder}: there is no snapshot{f' at step {step}, but at {steps[:20]}' if steps else ''}")
    snapshots = []
    for saved, _, path in found:
        if saved > step:
            continue
        snapshot = load_file(path, mmap=True)
        if not {"step", "std", "info", "training", "weights", "buffers"} <= snapshot.keys():
            raise ValueError(f"{path}: is not a snapshot")
        del snapshot["sha256"]  # which is the file's
        snapshots.append(snapshot)
    return snapshots
