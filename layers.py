"""Magnitude-preserving layers: each keeps activations at RMS 1 by its own form, with nothing to learn or to measure.

normalize and rotate do so exactly; mp_silu, mp_sum, mp_cat and the layers in expectation, for independent inputs of RMS 1.
Two do not: attention averages tokens, so its result is the shorter the less they have in common; and modulation other
than rotation is free to scale.

Sources: [EDM2] Karras et al. 2024, arXiv 2312.02696; [MaP-DiT] Bill et al. 2025, arXiv 2505.19122.
Read this file first, then model.py. Torch only: copy what you need, each definition names what it leans on.

Legend: B batch, T tokens, D width, H heads. Magnitude means RMS, sqrt(mean(x²)), over the last dimension.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# ---- functions ----

class Normalize(torch.autograd.Function):
    """normalize(x): scale the last dimension to RMS 1, x / sqrt(mean(x²) + eps²), the norm in float32 [EDM2, Eq. 47].

    x: (..., D), float32 or a 16-bit type; the result has the same shape and dtype. eps = 1e-4 is an RMS: what lies well
    below it stays small instead of being blown up. The gradient is written out, being much shorter than the derived one; there is no second.
    """

    @staticmethod
    def forward(ctx, x):
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) / math.sqrt(x.shape[-1])
        inverse = (rms.square() + 1e-4**2).rsqrt().to(x.dtype)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, inverse = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)                           # the part of grad that points along y ...
        return torch.addcmul(grad, y, along, value=-1).mul_(inverse)        # ... cannot change y


normalize = Normalize.apply


def mp_silu(x):
    """SiLU divided by its RMS response to unit-normal input [EDM2, Eq. 81]."""
    return F.silu(x) * (1 / 0.596)


def mp_sum(a, b, t):
    """Weighted sum of two independent unit-magnitude tensors, again of unit magnitude [EDM2, Eq. 88].

    t: weight of b, 0 to 1. Shapes broadcast.
    """
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return torch.add(a * ((1 - t) / norm), b, alpha=t / norm)


def mp_cat(a, b, t=0.5):
    """Concatenate along the last dimension so that b contributes a share t of the magnitude [EDM2, Eq. 103].

    a: (..., Na), b: (..., Nb) -> (..., Na + Nb) with RMS 1 if a and b have RMS 1. t: a number, or a tensor that broadcasts.
    """
    scale = ((a.shape[-1] + b.shape[-1]) / ((1 - t) ** 2 + t**2)) ** 0.5
    return torch.cat([a * (scale * (1 - t) / math.sqrt(a.shape[-1])), b * (scale * t / math.sqrt(b.shape[-1]))], dim=-1)


class Rotate(torch.autograd.Function):
    """rotate(x, theta): turn the D channels, seen as D/2 planes (i, i + D/2), by the angles theta [MaP-DiT].

    x: (..., D), theta: (..., D/2) in radians, broadcast against each other -> (..., D), the dtype of x, computed in
    float32. Every norm stays as it is. The gradient is written out: for x it is the rotation by -theta; there is no second.
    """

    @staticmethod
    def turn(x, cos, sin):
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)], dim=-1).to(x.dtype)

    @staticmethod
    def forward(ctx, x, theta):
        cos, sin = theta.float().cos(), theta.float().sin()
        y = Rotate.turn(x, cos, sin)
        ctx.save_for_backward(y, cos, sin)
        ctx.x_shape, ctx.theta_shape, ctx.theta_dtype = x.shape, theta.shape, theta.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, cos, sin = ctx.saved_tensors
        grad_x = Rotate.turn(grad, cos, -sin)
        (ga, gb), (a, b) = grad.float().chunk(2, dim=-1), y.float().chunk(2, dim=-1)
        grad_theta = (gb * a).addcmul_(ga, b, value=-1)                     # the cross product of y and grad, per plane
        return grad_x.sum_to_size(ctx.x_shape), grad_theta.sum_to_size(ctx.theta_shape).to(ctx.theta_dtype)


rotate = Rotate.apply


# ---- layers ----

class MPFourier(nn.Module):
    """Random Fourier features of a scalar, sqrt(2)·cos(2π(f·x + phi)), with f ~ N(0, 1), phi ~ U(0, 1) fixed [EDM2, Eq. 75].

    (B,) -> (B, width), float32.
    """

    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, x):
        return math.sqrt(2) * torch.cos(x.float()[:, None] * self.freqs + self.phases)


class MPLinear(nn.Module):
    """Linear map without bias in which every row w acts as w/‖w‖ [EDM2, Eq. 47].

    (..., fan_in) -> (..., fan_out), times `gain`, a number or a tensor that broadcasts with the result. The weight is
    stored with rows of RMS 1. While training under forced weight normalization they are known to be there and used as
    they are; otherwise, whatever is stored, they are normalised on the way.
    """

    forced = False  # set by force_weight_normalization()

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(fan_out, fan_in), dim=1) * math.sqrt(fan_in))

    def forward(self, x, gain=1.0):
        fan_out, fan_in = self.weight.shape
        weight = self.weight if self.forced and self.training else F.normalize(self.weight, dim=1) * math.sqrt(fan_in)
        scale = gain / math.sqrt(fan_in)
        if fan_in < fan_out and not torch.is_tensor(gain):
            return F.linear(x * scale, weight)                              # scale the smaller side
        return F.linear(x, weight) * scale


class MPEmbedding(nn.Module):
    """A table of unit-magnitude vectors, one per class. Leans on: normalize.

    Integer labels (B,) in 0..count-1 -> (B, width). Normalised after the look-up, which is cheap, in every mode.
    """

    def __init__(self, count, width):
        super().__init__()
        self.weight = nn.Parameter(normalize(torch.randn(count, width)))

    def forward(self, labels):
        return normalize(F.embedding(labels, self.weight))


class MPAttention(nn.Module):
    """Multi-head cosine attention: q, k and v have RMS 1 per head, so no logit exceeds sqrt(D/H) [EDM2, MaP-DiT].
    Leans on: normalize, MPLinear.

    (B, T, D) -> (B, T, D), times `gain`; D must be divisible by heads.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = MPLinear(width, 3 * width)
        self.out = MPLinear(width, width)

    def forward(self, x, gain=1.0):
        qkv = normalize(self.qkv(x).unflatten(-1, (3, self.heads, -1)))     # (B, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # each (B, H, T, D/H)
        x = F.scaled_dot_product_attention(q, k, v)                         # softmax(q·k / sqrt(D/H)) v
        return self.out(x.transpose(1, 2).flatten(2), gain)                 # (B, T, D)


class MPMLP(nn.Module):
    """Two magnitude-preserving linears around a SiLU. Leans on: mp_silu, MPLinear.

    (..., D) -> (..., D), times `gain`.
    """

    def __init__(self, width, hidden):
        super().__init__()
        self.up = MPLinear(width, hidden)
        self.down = MPLinear(hidden, width)

    def forward(self, x, gain=1.0):
        return self.down(F.silu(self.up(x)), gain / 0.596)                  # mp_silu, its constant moved past the linear


class Modulation(nn.Module):
    """Lets a conditioning vector act on a branch of the network [MaP-DiT]. Leans on: rotate, MPLinear.

    kinds: any subset of "rotate" (turn the channels), "scale" (x·(1 + s)) and "shift" (x + b), applied to what enters
    the branch in this order, and "gate" ((1 + g)·branch) for what leaves it. Every kind has its own learned gain, zero
    at first: an untrained modulation does nothing.

    forward(x, cond, branch): x (B, T, D), cond (B, D) -> branch(x), where branch is one of the layers above or anything
    else that can be called as branch(x) or, for a gate, as branch(x, gain) with a gain (B, 1, D) on its result.
    """

    KINDS = ("rotate", "scale", "shift", "gate")

    def __init__(self, width, kinds):
        super().__init__()
        if unknown := set(kinds) - set(self.KINDS):
            raise ValueError(f"modulation: {sorted(unknown)[0]!r} is not one of {', '.join(self.KINDS)}")
        self.kinds = [kind for kind in self.KINDS if kind in kinds]
        if not self.kinds:
            return
        self.sizes = [width // 2 if kind == "rotate" else width for kind in self.kinds]
        self.linear = MPLinear(width, sum(self.sizes))
        self.gain = nn.Parameter(torch.zeros(len(self.kinds)))

    def forward(self, x, cond, branch):
        if not self.kinds:
            return branch(x)
        gain = torch.cat([gain.expand(size) for gain, size in zip(self.gain, self.sizes)])
        values = self.linear(cond, gain)[:, None].split(self.sizes, dim=-1)         # one (B, 1, D or D/2) per kind
        value = dict(zip(self.kinds, values))
        if "rotate" in value:
            x = rotate(x, value["rotate"])
        if "scale" in value:
            x = x * (1 + value["scale"])
        if "shift" in value:
            x = x + value["shift"]
        return branch(x, 1 + value["gate"]) if "gate" in value else branch(x)


# ---- forced weight normalization ----

def mp_weights(model):
    """The weights of all magnitude-preserving layers of a model."""
    return [module.weight for module in model.modules() if isinstance(module, (MPLinear, MPEmbedding))]


def force_weight_normalization(model):
    """Promise the layers of `model` that their weights sit at RMS 1 while it trains [EDM2, Eq. 66]. Returns the weights.

    Normalising a row that is at RMS 1 changes nothing, and its gradient is the plain one less the part along the row. So
    in train mode linear layers skip the normalization, and both halves are made good around every optimizer step:

        loss.backward(); project_gradients(weights); optimizer.step(); normalize_weights(weights)
    """
    for module in model.modules():
        if isinstance(module, MPLinear):
            module.forced = True
    return mp_weights(model)


@torch.no_grad()
def project_gradients(weights):
    """Remove from each row's gradient its part along the row: the gradient through `normalize` at RMS 1 [EDM2, Eq. 47]."""
    for weight in weights:
        along = (weight.grad * weight).mean(1, keepdim=True)
        weight.grad.addcmul_(weight, along, value=-1)


@torch.no_grad()
def normalize_weights(weights):
    """Put every row of every weight back to RMS 1, in place [EDM2, Eq. 66]."""
    for weight in weights:
        norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp(min=1e-12)
        weight.mul_(math.sqrt(weight.shape[1]) / norm)
