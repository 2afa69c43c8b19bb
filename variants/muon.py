"""Muon: a step turns a matrix by the same amount in all its directions.

    python train.py --config=configs/compare.toml --optimizer=muon --schedule=linear

Adam scales each entry of a gradient by itself. Muon treats it as what it is, a matrix: it keeps the singular vectors of
the averaged gradient and brings its singular values near 1. So rare directions are learned as fast as frequent ones.

The size of an update is an angle. Its RMS is rate × that of the matrix at its start, and where this is 1, as in an
MPLinear, an update perpendicular to a row turns the row by arctan(rate), in a network of any width (in the mean over
rows where there are more rows than columns). With `learning_rate` 0.08 and `matrix_rate` 0.25 this is 0.02 radians. In
training it is 0.7 to 0.88 of that, since singular values end near 1, not at it: about one degree in every matrix. A
plain matrix starts at another RMS for each width, so its rate is measured by that. But a plain matrix grows, and then
the same rate turns it less.

A matrix that computes several things is updated in parts [CMuon]: q, k and v, and the kinds of a modulation. Updated as
one, a part with a small gradient could get little. (The small networks tried did no worse, results/ingredients.md.)

Muon is for the matrices of blocks alone, `matrices` in model.py; all else stays with Adam, at the whole
`learning_rate`. There is no weight decay: forced normalization does its work, and DiT is trained without.

Sources: [Muon] Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; in parts: [CMuon] arXiv 2608.02502.
"""

import math

import torch


def orthogonal(M, steps=5):
    """The semi-orthogonal matrices nearest to M, (N, rows, columns), by Newton-Schulz steps X <- aX + b(XXᵀ)X +
    c(XXᵀ)²X [Muon]; zeros stay zeros. Why not an SVD: these are matrix products only, and with these numbers five of
    them bring singular values between 0.002 and 1 to 0.68 to 1.2, which is near enough. Smaller ones stay smaller."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = M.shape[1] > M.shape[2]
    X = M.mT if tall else M
    X = X.to(torch.bfloat16 if M.is_cuda else torch.float32)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(M.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for matrices, with momentum 0.95 as Nesterov has it. groups: as of any optimizer of torch, the rate of each
    in its "lr". parts: {matrix: numbers of rows of its parts}, for all of them."""

    def __init__(self, groups, parts):
        super().__init__(groups, {"lr": 0.0})
        self.parts = parts

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates, by_shape = {}, {}
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for p in with_gradient:
                if p not in self.state:
                    rms = p.square().mean().sqrt()
                    rms = torch.where(rms > 0, rms, p.shape[1] ** -0.5)
                    self.state[p] = {"momentum": torch.zeros_like(p), "rms": rms}
                momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
                updates[p] = p.grad.lerp(momentum, 0.95)
                for part in updates[p].split(self.parts[p]):
                    by_shape.setdefault(part.shape, []).append(part)
            for shape, parts in by_shape.items():  # all of a shape at once: fewer and larger products
                for part, direction in zip(parts, orthogonal(torch.stack(parts))):
                    part.copy_(direction * math.sqrt(max(shape)))  # of RMS 1
            for p, update in updates.items():
                p.sub_(update * (group["lr"] * self.state[p]["rms"]))


class MuonAndAdam:
    """Muon for `matrices`, with parts as in Muon, and Adam for everything else: their groups, steps and states as one.
    groups: [{"lr_scale": factor on the rate, "params": [...]}, ...]. matrix_rate: one more factor for the matrices."""

    def __init__(self, groups, matrices, matrix_rate):
        ours, others = [], []
        for group in groups:
            mine = [p for p in group["params"] if p in matrices]
            rest = [p for p in group["params"] if p not in matrices]
            ours.append({"lr_scale": group["lr_scale"] * matrix_rate, "params": mine})
            others.append({"lr_scale": group["lr_scale"], "params": rest})
        self.muon = Muon(ours, matrices)
        self.adam = torch.optim.Adam(others, betas=(0.9, 0.99), fused=True)

    @property
    def param_groups(self):
        return self.muon.param_groups + self.adam.param_groups

    def step(self):
        self.muon.step()
        self.adam.step()

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state):
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
