"""Power-function EMA of any module's parameters [EDM2, section 3: Karras et al. 2024, arXiv 2312.02696].

The average after t steps weighs step s by s^gamma, so that its width is a fixed share `std` of the training so far,
however long that is. This file knows nothing of diffusion and imports nothing of ours: lift it out whole.

    ema = PowerEMA(model, stds=(0.05, 0.10))
    for step in range(1, steps + 1):
        ...                                   # one optimizer step
        ema.update(model, step)
        if step % 1000 == 0:
            for std, average in ema.averages.items():
                save_snapshot("ema", average, step, std)
"""

import copy
import os
import re
from pathlib import Path

import numpy as np
import torch


def std_to_gamma(std):
    """The exponent gamma of the profile t^gamma with relative width std, 0 < std < 0.289 [EDM2, Algorithm 2]."""
    if not 0 < std < 12**-0.5:
        raise ValueError(f"an EMA width must lie between 0 and 0.289 (a plain average), not {std}")
    s = std**-2.0
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def gamma_to_std(gamma):
    """Relative width of the profile t^gamma: its standard deviation over the training length [EDM2, Eq. 123]."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


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


def save_atomically(thing, path):
    """torch.save that leaves the whole file or the old one, whatever happens in between."""
    beside = Path(f"{path}.writing")
    try:
        with open(beside, "wb") as file:
            torch.save(thing, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_snapshot(folder, average, step, std, info=None, dtype=torch.float16):
    """Write folder/<step>-<std>.pt: parameters in `dtype`, buffers as they are, and `info`, anything made of plain
    numbers, strings, lists and dicts. Returns the path."""
    parameters = {name: p.detach().to("cpu", dtype) for name, p in average.named_parameters()}
    weights = {name: tensor.cpu() for name, tensor in average.state_dict().items()} | parameters
    path = Path(folder) / f"{step:07d}-{std:.3f}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_atomically({"step": step, "std": std, "weights": weights, "info": info or {}}, path)
    return path


def load_snapshot(path):
    """Read a snapshot: {"step", "std", "weights", "info"}, floating-point weights in float32, on the CPU."""
    snapshot = torch.load(path, map_location="cpu", weights_only=True)
    snapshot["weights"] = {name: w.float() if w.is_floating_point() else w for name, w in snapshot["weights"].items()}
    return snapshot


def list_snapshots(folder):
    """The snapshots in a folder, oldest first: [(step, std, path)]."""
    names = ((path, re.fullmatch(r"(\d+)-(0\.\d+)\.pt", path.name)) for path in Path(folder).glob("*.pt"))
    return sorted((int(name[1]), float(name[2]), path) for path, name in names if name)
