"""The ablation ladder: from the plain adaLN DiT to the magnitude-preserving one in single steps [MaP-DiT].

    python train.py --config=configs/ladder.toml --model.rung=E

    A  plain: the adaLN-Zero DiT of model.py
    B  + cosine attention: q, k and v have RMS 1 per head
    C  + weight normalization: each row of a linear acts as a unit vector, and there are no biases;
         where rung B starts with weights of 0, a learned gain starts at 0 instead
    D  + forced weight normalization: the stored rows are put back to RMS 1 after every step
    E  + mp residual: branches are added by mp_sum with t = residual_t, and a gate is 1 + g instead of g
    F  + mp SiLU: it replaces GELU in the MLP and SiLU in the conditioning
    G  - LayerNorm; before the output, tokens are scaled to RMS 1 instead
    H  + mp position encoding: centred, scaled to RMS 1 and added by mp_sum with t = 0.5
    I  + mp embedding: noise level and label have RMS 1 and are added by mp_sum with t = 0.5;
         this is the magnitude-preserving DiT of model.py

Source: [MaP-DiT] Bill et al. 2025, arXiv 2505.19122. The steps are the paper's. What they bring besides is our choice:
C drops the biases, E changes the gates and takes t from the depth, G scales tokens before the output, and I drops the
second noise layer. The conditioning scales, shifts and gates on all rungs. Read this file beside model.py: its two
families are the ends of the ladder.

Legend: B batch, C channels, P patch, T tokens, D width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import (MPMLP, Modulation, MPAttention, MPEmbedding, MPFourier, MPLinear, attention, mp_silu, mp_sum,
                    normalize)
from model import DiT, DiTConfig, PlainAttention, init_linears, position_embedding, scale_and_shift
from plumbing.keys import key

STEPS = {"cosine attention": "B", "weight normalization": "C", "forced weight normalization": "D", "mp residual": "E",
         "mp SiLU": "F", "no LayerNorm": "G", "mp position": "H", "mp embedding": "I"}


@dataclass
class Config(DiTConfig):
    rung: str = key("I", "how far up the ladder, A (plain) to I (magnitude-preserving)", choices=tuple("ABCDEFGHI"))
    modulation: tuple[str, ...] = key(("scale", "shift", "gate"), "scale, shift and gate, as on all rungs",
                                      choices=("scale", "shift", "gate"))

    def __post_init__(self):
        super().__post_init__()
        if self.block != "mp":
            raise ValueError("block: leave it out, the rung decides")
        if self.modulation != ("scale", "shift", "gate"):
            raise ValueError("modulation: must be scale, shift and gate, which is what adaLN has")

    def has(self, step):
        """Whether the rung is at or above that of a step, by its name in STEPS."""
        return self.rung >= STEPS[step]

    def network(self):
        return LadderDiT(self, (Input, Block, Output))


# ---- layers that neither end of the ladder has ----

class WeightNormLinear(nn.Module):
    """MPLinear, except that its stored rows are not put back to RMS 1: as they grow, they turn more slowly. Rung C."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(fan_out, fan_in), dim=1) * math.sqrt(fan_in))

    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=1))


def make_linear(config, fan_in, fan_out):
    """The linear layer of a rung, at its initial values."""
    if config.has("forced weight normalization"):
        return MPLinear(fan_in, fan_out)
    if config.has("weight normalization"):
        return WeightNormLinear(fan_in, fan_out)
    linear = nn.Linear(fan_in, fan_out)
    init_linears(linear)
    return linear


class ZeroModulation(nn.Module):
    """adaLN-Zero's scale and shift, x·(1 + s) + b, or its gate, x·g: (B, T, D), cond (B, D) -> (B, T, D).
    Rungs A to D. What starts at zero is a weight, or from weight normalization on a gain for each of s, b and g."""

    def __init__(self, config, kinds):
        super().__init__()
        self.kinds = kinds
        self.linear = make_linear(config, config.width, len(kinds) * config.width)
        self.gain = None
        if config.has("weight normalization"):
            self.gain = nn.Parameter(torch.zeros(len(kinds)))
        else:
            nn.init.zeros_(self.linear.weight)

    def forward(self, x, cond):
        values = self.linear(cond).float()[:, None].chunk(len(self.kinds), dim=-1)
        if self.gain is not None:
            values = [gain * value for gain, value in zip(self.gain, values)]
        return x * values[0] if self.kinds == ("gate",) else scale_and_shift(x, *values)


def make_modulation(config):
    """Scale and shift of a rung."""
    kinds = ("scale", "shift")
    return Modulation(config.width, kinds) if config.has("mp residual") else ZeroModulation(config, kinds)


def make_gate(config):
    """The gate of a rung: with mp residuals 1 + g, before that g."""
    return Modulation(config.width, ("scale",)) if config.has("mp residual") else ZeroModulation(config, ("gate",))


class CosineAttention(PlainAttention):
    """Multi-head attention with q, k and v of RMS 1, (B, T, D) -> (B, T, D). Rungs B and C."""

    def __init__(self, config):
        super().__init__(config.width, config.heads)
        self.qkv = make_linear(config, config.width, 3 * config.width)
        self.out = make_linear(config, config.width, config.width)

    def forward(self, x):
        q, k, v = normalize(self.qkv(x).unflatten(-1, (3, self.heads, -1))).permute(2, 0, 3, 1, 4)
        x = attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))


class GELUMLP(nn.Module):
    """DiT's MLP, two linears around a GELU: (..., D) -> (..., D). Rungs A to E."""

    def __init__(self, config):
        super().__init__()
        self.up = make_linear(config, config.width, 4 * config.width)
        self.down = make_linear(config, 4 * config.width, config.width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def make_attention(config):
    if config.has("forced weight normalization"):
        return MPAttention(config.width, config.heads)
    if config.has("cosine attention"):
        return CosineAttention(config)
    plain = PlainAttention(config.width, config.heads)
    init_linears(plain)
    return plain


def make_norm(config):
    """LayerNorm, or nothing: then tokens are near RMS 1 by construction."""
    return nn.Identity() if config.has("no LayerNorm") else nn.LayerNorm(config.width, 1e-6, elementwise_affine=False)


# ---- the parts of the network ----

class Input(nn.Module):
    """Patches (B, T, C·P²), noise levels (B,), labels (B,) -> tokens (B, T, D), conditioning (B, D)."""

    def __init__(self, config):
        super().__init__()
        D, self.config = config.width, config
        self.silu = mp_silu if config.has("mp SiLU") else F.silu
        constant = config.has("weight normalization")  # one more input, instead of a bias
        self.patch = make_linear(config, config.channels * config.patch**2 + constant, D)
        self.fourier = MPFourier(D)
        if config.has("mp embedding"):
            self.noise, self.label = MPLinear(D, D), MPEmbedding(config.num_classes + 1, D)
        else:
            self.noise = nn.ModuleList([make_linear(config, D, D), make_linear(config, D, D)])
            self.label = nn.Embedding(config.num_classes + 1, D)
            nn.init.normal_(self.label.weight, std=0.02)
        if not config.has("weight normalization"):
            for layer in self.noise:
                nn.init.normal_(layer.weight, std=0.02)
        position = position_embedding(D, config.image_size // config.patch)
        if config.has("mp position"):
            position = normalize(position - position.mean(dim=0))
        self.register_buffer("position", position)

    def forward(self, patches, c_noise, labels):
        if self.config.has("weight normalization"):
            patches = torch.cat([patches, torch.ones_like(patches[..., :1])], dim=-1)
        x = self.patch(patches)
        x = mp_sum(x, self.position, t=0.5) if self.config.has("mp position") else x + self.position
        noise, label = self.fourier(c_noise), self.label(labels)
        if self.config.has("mp embedding"):
            return x, self.silu(mp_sum(self.noise(noise), label, t=0.5))
        first, second = self.noise
        return x, self.silu(second(self.silu(first(noise))) + label)


class Block(nn.Module):
    """Tokens (B, T, D), conditioning (B, D) -> tokens (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.norm = make_norm(config)
        self.modulation1, self.gate1 = make_modulation(config), make_gate(config)
        self.attention = make_attention(config)
        self.modulation2, self.gate2 = make_modulation(config), make_gate(config)
        self.mlp = MPMLP(config.width, 4 * config.width) if config.has("mp SiLU") else GELUMLP(config)

    def forward(self, x, cond):
        x = self.join(x, self.gate1(self.attention(self.modulation1(self.norm(x), cond)), cond))
        x = self.join(x, self.gate2(self.mlp(self.modulation2(self.norm(x), cond)), cond))
        return x

    def join(self, x, branch):
        return mp_sum(x, branch, t=self.config.residual_t) if self.config.has("mp residual") else x + branch


class Output(nn.Module):
    """Tokens (B, T, D), conditioning (B, D) -> patches (B, T, C·P²), zero at initialisation."""

    def __init__(self, config):
        super().__init__()
        self.norm = normalize if config.has("no LayerNorm") else make_norm(config)
        self.modulation = make_modulation(config)
        self.linear = make_linear(config, config.width, config.channels * config.patch**2)
        self.gain = None
        if config.has("weight normalization"):
            self.gain = nn.Parameter(torch.zeros(()))
        else:
            nn.init.zeros_(self.linear.weight)

    def forward(self, x, cond):
        x = self.linear(self.modulation(self.norm(x), cond))
        return x if self.gain is None else self.gain * x


class LadderDiT(DiT):
    """The network of a rung, inputs and output as in DiT."""

    @property
    def matrices(self):
        modulations = [module for module in self.blocks.modules() if isinstance(module, ZeroModulation)]
        width = self.config.width
        return super().matrices | {module.linear.weight: len(module.kinds) * [width] for module in modulations}
