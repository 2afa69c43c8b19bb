"""Power-function EMA of any module's parameters, and any other width of it after training.

The average after t steps weights step s in proportion to s^gamma, so its relative width `std`
(EDM2's EMA length) is a fixed share of the training so far, however long. Two widths are tracked,
snapshots of both kept, and any other width is mixed from these after training:
`python ema.py out/digits --std 0.03 0.15`. This file knows nothing of diffusion and needs only
numpy and torch: lift it out whole, and plumbing/snapshots.py and files.py with it if you like. In
your own training loop:

    from ema import PowerEMA, reconstruct
    from plumbing.snapshots import load_snapshots, save_snapshot

    ema = PowerEMA(model)                       # widths 0.05 and 0.10
    for step in range(1, steps + 1):
        ...                                     # one optimizer step
        ema.update(model, step)
        if step % 1000 == 0 or step == steps:   # 20 to 50 times in all
            for std, average in ema.averages.items():
                save_snapshot("ema", average, step, std)
    for snapshot in reconstruct(load_snapshots("ema"), stds=[0.03, 0.15]):  # after training
        model.load_state_dict(snapshot["weights"])

What to trust, measured on the digits (relative L2 error of all weights): with 20 snapshots of each
width in float16, 0.02% for widths from 0.075 to 0.15, 0.1% at 0.03 and at 0.20. Narrow widths
enlarge the rounding to float16, wide ones need early snapshots.

Source: [EDM2] Karras et al. 2024, arXiv 2312.02696. Read train.py before, sample.py after.
"""

import copy
import sys
import uuid

import numpy as np
import torch


def std_to_gamma(std):
    """The exponent gamma of the profile t^gamma of relative width std [EDM2, Algorithm 2].
    Raises ValueError unless 0.001 <= std <= 0.288."""
    if not 0.001 <= std <= 0.288:
        raise ValueError(f"an EMA width must lie between 0.001 and 0.288, not {std}: "
                         "a plain average of all steps has 0.289")
    s = std**-2.0
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def inner_products(a, b):
    """Inner products of the profiles in two lists of (step, std) [EDM2, Algorithm 3].
    Returns float64 (len(a), len(b))."""
    ta, ga = np.array([(step, std_to_gamma(std)) for step, std in a]).T[:, :, None]
    tb, gb = np.array([(step, std_to_gamma(std)) for step, std in b]).T[:, None, :]
    ratio = (ta / tb) ** np.where(ta < tb, gb, -ga)
    return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * np.maximum(ta, tb))


def solve_coefficients(sources, targets):
    """How to mix `sources` so that they come closest to each of `targets`, all (step, std).

    Returns the coefficients, float64 (len(sources), len(targets)), each column summing to 1, and
    the residuals (len(targets),): the distance that is left between the profiles, relative to the
    target's norm. Why it works: an average is linear in its profile, so a mix of averages is the
    average of the mixed profile [EDM2, Algorithm 3]."""
    A = inner_products(sources, sources)
    b = inner_products(sources, targets)
    norm = np.sqrt(A.diagonal())[:, None]  # profiles of norm 1 are better conditioned
    x = np.linalg.solve(A / (norm * norm.T), b / norm) / norm
    x /= x.sum(axis=0)

    square = inner_products(targets, targets).diagonal()
    distance = square - 2 * (b * x).sum(axis=0) + (x * (A @ x)).sum(axis=0)  # |mix - target|²
    return x, np.sqrt(np.maximum(distance, 0) / square)


def unwrap(module):
    """The module inside what torch.compile and DistributedDataParallel wrap around it."""
    while True:
        if hasattr(module, "_orig_mod"):
            module = module._orig_mod
        elif isinstance(module, torch.nn.parallel.DistributedDataParallel):
            module = module.module
        else:
            return module


def check_can_be_averaged(module):
    """Raises ValueError for parameters that cannot be averaged: sharded ones, or without shapes."""
    for name, p in module.named_parameters():
        if hasattr(p, "device_mesh"):
            raise ValueError(f"{name} is sharded over processes, which PowerEMA does not support")
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(f"{name} has no shape yet: call the module once before PowerEMA")


def copy_of(module):
    """A copy of a module in eval mode, without gradients, floating-point parameters in float32 or
    better, since bfloat16 would lose small updates. Raises ValueError if it would not be whole."""
    for name, part in module.named_modules():
        if "forward" in vars(part):
            raise ValueError(f"the forward of {name or 'the module'} was replaced, and that of a "
                             "copy would use the original's weights: replace it after PowerEMA")
    try:
        average = copy.deepcopy(module).eval().requires_grad_(False)
    except (RuntimeError, TypeError) as error:
        name = type(module).__name__
        raise ValueError(f"this {name} cannot be copied: {error}") from error
    for p in average.parameters():
        if p.is_floating_point():
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    return average


def pairs_by_name(average, module):
    """Pairs of parameters and buffers of one name. Raises ValueError if names or shapes differ."""
    ours, theirs = ({name: tensor for part in (m.named_parameters(), m.named_buffers())
                     for name, tensor in part} for m in (average, module))
    shapes, expected = ({name: tensor.shape for name, tensor in tensors.items()}
                        for tensors in (theirs, ours))
    if shapes != expected:
        odd = sorted({name for name, _ in shapes.items() ^ expected.items()})
        raise ValueError(f"not the module that PowerEMA was made of: {', '.join(odd)[:200]}")
    return [(ours[name], theirs[name]) for name in ours]


class PowerEMA:
    """Running averages of a module, one for each relative width. Why: a model with averaged weights
    draws far better images than the one that the last step left behind.

    averages: {std: the average, a copy of the module in eval mode, in float32 or better}.
    Parameters with requires_grad are averaged, frozen ones and buffers are copied from the module.
    So running statistics of batch normalizations do not belong to the averaged weights: before you
    use such an average, renew them with torch.optim.swa_utils.update_bn(batches, average).

    id: tells the snapshots of this training from those of others (default: random). Raises
    ValueError for sharded or shapeless parameters, for a module that cannot be copied, and for one
    whose forward was replaced. Hooks and functions that hold on to the module it cannot see."""

    def __init__(self, module, stds=(0.05, 0.10), id=None):
        module = unwrap(module)
        check_can_be_averaged(module)
        self.step = 0
        self.id = id or uuid.uuid4().hex
        self.gammas = {float(std): std_to_gamma(std) for std in stds}
        self.averages = {std: copy_of(module) for std in self.gammas}
        self.mark([name for name, p in module.named_parameters() if not p.requires_grad])

    def mark(self, frozen):
        """Note at each average what a snapshot of it needs: its training, and which parameters are
        not averaged, by name. Why in __dict__: a module may have attributes of any usual name."""
        for average in self.averages.values():
            vars(average)["_power_ema"] = {"training": self.id, "frozen": frozen}

    @torch.no_grad()
    def update(self, module, step):
        """Call after optimizer step `step`, counted from 1; after every step, or every n-th.
        average ← beta·average + (1 - beta)·module with
        beta = (previous step / step)^(gamma + 1) [EDM2, Eq. 127].
        Raises ValueError for a module of other parameters or buffers."""
        if step <= self.step:
            raise ValueError(f"the last update was at step {self.step}, "
                             f"the next must be later, not {step}")
        module = unwrap(module)
        check_can_be_averaged(module)
        self.mark([name for name, p in module.named_parameters() if not p.requires_grad])
        for std, average in self.averages.items():
            beta = (self.step / step) ** (self.gammas[std] + 1)
            averaged, latest = [], []
            for ours, theirs in pairs_by_name(average, module):
                if theirs.requires_grad:
                    averaged.append(ours)
                    latest.append(theirs.to(ours.dtype))
                else:
                    ours.copy_(theirs)
            if averaged:
                torch._foreach_lerp_(averaged, latest, 1 - beta)  # one kernel for all parameters
        self.step = step

    def state_dict(self):
        averages = {std: average.state_dict() for std, average in self.averages.items()}
        return {"step": self.step, "id": self.id, "averages": averages}

    def load_state_dict(self, state):
        self.step, self.id = state["step"], state["id"]
        for std, average in self.averages.items():
            average.load_state_dict(state["averages"][std])
            vars(average)["_power_ema"]["training"] = self.id


def shapes_of(weights):
    """{name: shape} of the tensors of a state_dict, which may also hold a module's extra state."""
    return {name: w.shape for name, w in weights.items() if torch.is_tensor(w)}


@torch.no_grad()
def reconstruct(snapshots, stds):
    """The averages of relative widths `stds` at the last snapshot's step, mixed from all snapshots.

    snapshots: oldest first, each a dict of step, std, weights (a state_dict), buffers (the names in
    it that are not averaged), and info and training, which are the same in all.
    Returns such a dict for each of `stds`, with weights in float32 and the last one's buffers.
    Warns on stderr of a width that the snapshots cannot express (on the digits, a residual of 0.03
    goes with weights that are 0.1 to 0.2% off). Raises ValueError for snapshots of different
    models."""
    if not snapshots:
        raise ValueError("there are no snapshots to mix")
    last = snapshots[-1]
    shapes = shapes_of(last["weights"])
    for snapshot in snapshots:
        theirs = shapes_of(snapshot["weights"])
        for what, same in (("model", theirs == shapes and snapshot.get("info") == last.get("info")),
                           ("training", snapshot.get("training") == last.get("training"))):
            if not same:
                raise ValueError(
                    f"the snapshot of step {snapshot['step']}, width {snapshot['std']} is from "
                    f"another {what} than the last, of step {last['step']}, width {last['std']}")
    sources = [(snapshot["step"], snapshot["std"]) for snapshot in snapshots]
    targets = [(last["step"], std) for std in stds]
    coefficients, residuals = solve_coefficients(sources, targets)
    for std, residual in zip(stds, residuals):
        if residual > 0.03:
            print(f"warning: EMA width {std} is beyond what the snapshots can express: the nearest "
                  f"profile is {residual:.1%} off, trust up to 3%; more snapshots would help",
                  file=sys.stderr)

    coefficients = torch.from_numpy(coefficients.T).float()  # (widths, snapshots)
    results = [last | {"std": std, "weights": dict(last["weights"])} for std in stds]
    for name in shapes.keys() - set(last["buffers"]):
        # a row holds all snapshots of 2^20 values, so that few of them are in memory at once
        rows = zip(*(snapshot["weights"][name].flatten().split(2**20) for snapshot in snapshots))
        mixed = torch.cat([coefficients @ torch.stack(row).float() for row in rows], dim=1)
        for result, values in zip(results, mixed):
            result["weights"][name] = values.view(shapes[name])
    return results


def plan(count, stds):
    """[(width, residual), ...] for widths from 0.02 to 0.25: how well they could be mixed at the
    end of a training that keeps `count` snapshots, evenly spaced, of each of the widths `stds`."""
    sources = [(number, std) for number in range(1, count + 1) for std in stds]
    widths = (0.02, 0.03, 0.04, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25)
    _, residuals = solve_coefficients(sources, [(count, width) for width in widths])
    return list(zip(widths, residuals.tolist()))


def main():
    from plumbing.command import Parser, UserError, between, path_type, reading
    from plumbing.snapshots import load_snapshots, write_snapshot

    parser = Parser(__doc__)
    parser.add_argument("folder", type=path_type, nargs="?",
                        help="a run directory, or a folder of snapshots")
    parser.add_argument("--std", type=between(float, 0.001, 0.288), nargs="+", required=True,
                        help="relative widths, 0.001 to 0.288")
    parser.add_argument("--step", type=int,
                        help="training step to reconstruct them at (default: the last snapshot's)")
    parser.add_argument("--plan", type=between(int, 1, 1000), metavar="COUNT",
                        help="before a run: print which widths could be mixed from COUNT snapshots "
                             "of each of the widths --std")
    args = parser.parse_args()
    if args.plan:
        for width, residual in plan(args.plan, args.std):
            verdict = "trust it" if residual <= 0.03 else "too far off"
            print(f"width {width:<5g}  profile {residual:6.2%} off  {verdict}")
        return
    if not args.folder:
        raise UserError("name a run directory or a folder of snapshots, or use --plan")
    folder = args.folder / "ema" if (args.folder / "ema").is_dir() else args.folder
    with reading(folder, ValueError):
        for snapshot in reconstruct(load_snapshots(folder, args.step), args.std):
            print(write_snapshot(folder / "posthoc", snapshot), flush=True)


if __name__ == "__main__":
    from plumbing.command import run_main
    run_main(main)
