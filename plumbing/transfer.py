"""The weights of one network put into another, as far as they fit. Nothing here is about diffusion."""

from dataclasses import asdict

import torch

from plumbing.command import reading
from plumbing.processes import rank


def rows_by_class(table, classes):
    """{name of a class: its vector}, all of them views of `table`; the null label's name is None. A table has a row for
    each class and one for the null label; or, as a linear layer that reads one-hot labels, a column for each class."""
    names = [*classes, None]
    rows = table if len(table) == len(names) else table.T
    return dict(zip(names, rows))


def must_agree(ours, theirs, names):
    """Raise ValueError unless both networks, {name of a key: value}, agree in these keys: their tensors could have the
    same names and shapes and mean something else."""
    for name in names:
        here, there = ours.get(name), theirs.get(name)
        if here != there:
            raise ValueError(f"is another network: {name} = {there!r}, here {here!r}")


@torch.no_grad()
def transfer(weights, source, classes, source_classes):
    """Copy into `weights`, in place, what fits of `source`; both are state_dicts.

    A tensor fits one of the same name and shape. In tables of classes, whose names end in label.weight, each class
    takes the vector of the class with the same name. classes, source_classes: the names of the classes of both, in the
    order of their labels. Returns a list of what stays as it was: names of tensors and of classes.
    Why by name: the third class of another set shows something else."""
    fresh = []
    for name, tensor in weights.items():
        if name.endswith("label.weight") and name in source:
            theirs = rows_by_class(source[name], source_classes)
            for label, row in rows_by_class(tensor, classes).items():
                if label in theirs and theirs[label].shape == row.shape:
                    row.copy_(theirs[label])
                else:
                    fresh.append("the null label" if label is None else f"class {label}")
        elif name in source and source[name].shape == tensor.shape:
            tensor.copy_(source[name])
        else:
            fresh.append(name)
    return fresh


def take_weights(path, snapshot, weights, run):
    """Give a new run's `weights`, a state_dict, what fits of a snapshot, note it in the log, and print what starts
    fresh. path: of the snapshot. Raises UserError for that of another network."""
    info, config = snapshot["info"], run.config
    ours = {"variant": config.variant} | asdict(config.model)
    theirs = {"variant": info["variant"]} | info["model"]
    with reading(path, ValueError):
        must_agree(ours, theirs, ("variant", "block", "width", "heads", "modulation"))
    classes = run.facts["classes"] if ours["num_classes"] else []
    their_classes = info["data"]["classes"] if theirs.get("num_classes") else []
    fresh = transfer(weights, snapshot["weights"], classes, their_classes)
    if rank() == 0:
        run.log(init=str(path), sha256=snapshot["sha256"], fresh=fresh)
    more = f" and {len(fresh) - 20} more" if len(fresh) > 20 else ""
    print(f"starts from {path}; fresh: {', '.join(fresh[:20]) or 'nothing'}{more}", flush=True)
