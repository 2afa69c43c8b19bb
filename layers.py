"""Magnitude-preserving layers: each maps inputs of RMS 1 to outputs of RMS 1 by construction.

normalize, rotate, mp_cat and MPEmbedding do so exactly; the others in expectation, for independent
and roughly normal inputs, which the network has at initialisation. Attention averages its values,
which lowers their RMS, and scale, shift and gate may change it. In training, branches come to agree
with what they are added to, so tokens do grow, to an RMS of 1.2 to 2.5 on small sets; weights do
not. Rows of weights are stored at RMS 1 and used at length 1: no step turns a row by less because
the row has grown.

Sources: [EDM2] Karras et al. 2024, arXiv 2312.02696; [MaP-DiT] Bill et al. 2025, arXiv 2505.19122.
Read this file first, then model.py. It needs torch only: copy what you like, each definition names
the others that it uses.

Legend: B batch, T tokens, D width, H heads. Magnitude is the RMS, sqrt(mean(x²)), of a vector,
which lies along the last dimension.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def normalize(x):
    """Scale the last dimension to RMS 1: (..., D) -> (..., D), same dtype, the RMS taken in float32
    [EDM2, Eq. 47]. Why: this is what makes a vector's length carry no information.
    Vectors of RMS below 1e-4 are only enlarged 10,000 times, so zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rms = norm / math.sqrt(x.shape[-1])
    return (x * (1 / rms.clamp(min=1e-4))).to(x.dtype)


def mp_silu(x):
    """SiLU divided by 0.596, its RMS for unit-normal input [EDM2, Eq. 81].
    Why: SiLU alone shrinks what it gets."""
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    """Weighted sum of two independent tensors of RMS 1, again of RMS 1 [EDM2, Eq. 88].
    t: share of b, from 0 to 1. Shapes broadcast.
    Why: residual streams that only add grow with depth."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return torch.add(a * ((1 - t) / norm), b, alpha=t / norm)


def mp_cat(a, b, t=0.5):
    """Concatenate (..., Na) and (..., Nb) to (..., Na + Nb), b with a share t of the magnitude
    [EDM2, Eq. 103]. t: a number, or a tensor that broadcasts.
    Why: without weights, the wider of the two would drown the other."""
    Na, Nb = a.shape[-1], b.shape[-1]
    scale = ((Na + Nb) / ((1 - t) ** 2 + t**2)) ** 0.5
    a = a * (scale * (1 - t) / math.sqrt(Na))
    b = b * (scale * t / math.sqrt(Nb))
    return torch.cat([a, b], dim=-1)


def rotate(x, theta):
    """Turn the D channels of x, seen as D/2 planes (i, i + D/2), by the angles theta [MaP-DiT].
    x: (..., D), theta: (..., D/2) in radians, broadcast against each other -> (..., D), dtype of x.
    Raises ValueError if their sizes do not fit. Why: the conditioning can change every token
    without changing any norm, for half the weights of a scale."""
    D = x.shape[-1]
    if D != 2 * theta.shape[-1]:
        raise ValueError(f"rotate: {D} channels need {D / 2:g} angles, not {theta.shape[-1]}")
    cos, sin = theta.float().cos(), theta.float().sin()
    partner = x.roll(D // 2, dims=-1)  # the other channel of each plane
    turned = x * torch.cat([cos, cos], dim=-1) + partner * torch.cat([-sin, sin], dim=-1)
    return turned.to(x.dtype)


def attention(q, k, v):
    """softmax(q·kᵀ / sqrt(d))·v, each (B, H, T, d) -> (B, H, T, d).
    Why written out on CPUs: there torch's fused attention (2.13) has no second derivative. With 16
    to 256 tokens it takes 2 to 11 times as long in bfloat16, 0.6 to 1.0 times in float32 (measured
    on an Intel Xeon). Elsewhere the fused one saves the memory of the (B, H, T, T) weights."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return logits.softmax(dim=-1) @ v


class MPFourier(nn.Module):
    """Fourier features sqrt(2)·cos(2π(f·x + phi)) of a scalar, with f ~ N(0, 1) and phi ~ U(0, 1)
    fixed [EDM2, Eq. 75]: (B,) -> (B, width), float32.
    Why: a network reads a number far better from many waves than from its value."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, x):
        return math.sqrt(2) * torch.cos(x.float()[:, None] * self.freqs + self.phases)


class MPLinear(nn.Module):
    """Linear map without bias in which each row w acts as w/‖w‖: (..., fan_in) -> (..., fan_out)
    [EDM2, Eq. 47]. Why: only the direction of a row acts, so its gradient has no part along the
    row. Stored rows may have any length; force_weight_normalization() keeps them at RMS 1."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        rows = torch.randn(fan_out, fan_in)
        self.weight = nn.Parameter(F.normalize(rows, dim=1) * math.sqrt(fan_in))

    def unit_rows(self):
        """The rows as they act, w/‖w‖: (fan_out, fan_in), rows of zeros as they are."""
        w = self.weight
        norm = torch.linalg.vector_norm(w, dim=1, keepdim=True, dtype=torch.float32)
        return (w / norm.clamp(min=1e-12)).to(w.dtype)

    def forward(self, x):
        return F.linear(x, self.unit_rows().to(x.dtype))


class MPEmbedding(nn.Module):
    """A table of vectors of RMS 1, one per class: integer labels (B,) in 0..count-1 -> (B, width).
    Uses: normalize. Why normalised after the look-up: the same result as before it, for B rows
    instead of all."""

    def __init__(self, count, width):
        super().__init__()
        self.weight = nn.Parameter(normalize(torch.randn(count, width)))

    def forward(self, labels):
        return normalize(F.embedding(labels, self.weight))


class MPAttention(nn.Module):
    """Multi-head cosine attention, (B, T, D) -> (B, T, D). Uses: normalize, attention, MPLinear.
    Raises ValueError unless heads divides the width. Why cosine: with q and k at RMS 1 per head, no
    logit exceeds sqrt(D/H) [EDM2, MaP-DiT]. v is normalised as well."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: {heads} do not divide a width of {width}")
        self.heads = heads
        self.qkv = MPLinear(width, 3 * width)
        self.out = MPLinear(width, width)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D/H)
        q, k, v = normalize(qkv).permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        x = attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, D)


class MPMLP(nn.Module):
    """Two linears around a SiLU, (..., D) -> (..., D). Uses: mp_silu, MPLinear.
    Why: it is where a transformer computes on each token by itself."""

    def __init__(self, width, hidden):
        super().__init__()
        self.up = MPLinear(width, hidden)
        self.down = MPLinear(hidden, width)

    def forward(self, x):
        return self.down(mp_silu(self.up(x)))


class Modulation(nn.Module):
    """What the conditioning does to tokens: scale x·(1 + s), shift x + b and rotate them, in the
    order of the paper's code. x (B, T, D), cond (B, D) -> (B, T, D) [MaP-DiT].
    Uses: rotate, MPLinear.

    kinds: any of KINDS, or none; raises ValueError for others. A gate is a scale behind a branch.
    Why a learned gain for each kind, zero at first: an untrained modulation does nothing."""

    KINDS = ("scale", "shift", "rotate")

    def __init__(self, width, kinds):
        super().__init__()
        if isinstance(kinds, str) or set(kinds) - set(self.KINDS):
            raise ValueError(f"kinds: must be some of {', '.join(self.KINDS)}, not {kinds!r}")
        self.sizes = {}
        for kind in self.KINDS:
            if kind in kinds:
                self.sizes[kind] = width // 2 if kind == "rotate" else width
        if self.sizes:
            self.linear = MPLinear(width, sum(self.sizes.values()))
            self.gain = nn.Parameter(torch.zeros(len(self.sizes)))

    def forward(self, x, cond):
        if not self.sizes:
            return x
        values = self.linear(cond).float()[:, None]  # float: 1 + scale needs more than bfloat16
        parts = values.split(list(self.sizes.values()), dim=-1)
        for kind, part, gain in zip(self.sizes, parts, self.gain):
            if kind == "scale":
                x = x * (1 + gain * part)
            elif kind == "shift":
                x = x + gain * part
            elif kind == "rotate":
                x = rotate(x, gain * part)
        return x


@torch.no_grad()
def force_weight_normalization(model):
    """Put every row of the MPLinear and MPEmbedding weights in `model` back to RMS 1, in place
    [EDM2, Eq. 66]. Call it after every optimizer step. Uses: MPLinear, MPEmbedding; another layer
    with such rows must be one of these, or be added here.
    Why: a step perpendicular to a row lengthens the row, and the longer it is, the less the next
    step turns it. With rows of one length, the learning rate schedule alone sets how fast they
    turn."""
    for module in model.modules():
        if isinstance(module, (MPLinear, MPEmbedding)):
            w = module.weight
            w.mul_(math.sqrt(w.shape[1]) / w.norm(dim=1, keepdim=True).clamp(min=1e-12))
