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

from layers import (MPMLP, Modulation, MPAttention, MPEmbedding, MPFourier, MPLinear, attention, modulate, mp_silu,
                    mp_sum, normalize)
from model import DiT, DiTConfig, PlainAttention, init_linears, position_embedding
from plumbing.keys import key


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

    def network(self):
        net = DiT(self, (Input, Block, Output))
        if self.rung < "C":
            init_plain(net)
        if self.rung < "I":
            nn.init.normal_(net.input.label.weight, std=0.02)
        return net


# ---- layers that neither end of the ladder has ----

class WeightNormLinear(nn.Module):
    """MPLinear, except that its stored rows are not put back to RMS 1: as they grow, they turn more slowly. Rung C."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(fan_out, fan_in), dim=1) * math.sqrt(fan_in))

    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=1))


def linear(rung):
    """The class of the linear layers on a rung."""
    return nn.Linear if rung < "C" else WeightNormLinear if rung < "D" else MPLinear


class ZeroModulation(nn.Module):
    """adaLN-Zero as a module: it returns theta, scale, shift and gate as layers.Modulation does, theta always None.

    count: 3 with a gate, 2 without. Rungs A to D.
    """

    def __init__(self, config, count):
        super().__init__()
        self.linear = linear(config.rung)(config.width, count * config.width)
        self.gain = nn.Parameter(torch.zeros(count)) if config.rung >= "C" else None

    def forward(self, cond):
        values = self.linear(cond).unflatten(-1, (-1, 1, cond.shape[-1]))  # (B, count, 1, D)
        scale, shift, *gate = (values if self.gain is None else values * self.gain[:, None, None]).unbind(1)
        return None, scale, shift, gate[0] if gate else 0.0


class CosineAttention(PlainAttention):
    """Multi-head attention with q, k and v of RMS 1, (B, T, D) -> (B, T, D). Rungs B and C."""

    def __init__(self, config):
        super().__init__(config.width, config.heads)
        self.qkv = linear(config.rung)(config.width, 3 * config.width)
        self.out = linear(config.rung)(config.width, config.width)

    def forward(self, x):
        qkv = normalize(self.qkv(x).unflatten(-1, (3, self.heads, -1)))
        x = attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.out(x.transpose(1, 2).flatten(2))


class GELUMLP(nn.Module):
    """DiT's MLP, two linears around a GELU: (..., D) -> (..., D). Rungs A to E."""

    def __init__(self, config):
        super().__init__()
        self.up = linear(config.rung)(config.width, 4 * config.width)
        self.down = linear(config.rung)(4 * config.width, config.width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


# ---- the parts of the network ----

class Input(nn.Module):
    """Patches (B, T, C·P²), noise levels (B,), labels (B,) -> tokens (B, T, D), conditioning (B, D)."""

    def __init__(self, config):
        super().__init__()
        D, self.rung, Linear = config.width, config.rung, linear(config.rung)
        self.patch = Linear(config.channels * config.patch**2 + (self.rung >= "C"), D)
        self.fourier = MPFourier(D)
        self.silu = mp_silu if self.rung >= "F" else F.silu
        if self.rung >= "I":
            self.noise, self.label = MPLinear(D, D), MPEmbedding(config.num_classes + 1, D)
        else:
            self.noise = nn.ModuleList([Linear(D, D), Linear(D, D)])
            self.label = nn.Embedding(config.num_classes + 1, D)
        position = position_embedding(D, config.image_size // config.patch)
        if self.rung >= "H":
            position = normalize(position - position.mean(dim=0))
        self.register_buffer("position", position, persistent=False)

    def forward(self, patches, c_noise, labels):
        if self.rung >= "C":  # a constant instead of a bias
            patches = torch.cat([patches, torch.ones_like(patches[..., :1])], dim=-1)
        x = self.patch(patches)
        x = mp_sum(x, self.position, t=0.5) if self.rung >= "H" else x + self.position
        noise, label = self.fourier(c_noise), self.label(labels)
        if self.rung >= "I":
            return x, self.silu(mp_sum(self.noise(noise), label, t=0.5))
        return x, self.silu(self.noise[1](self.silu(self.noise[0](noise))) + label)


class Block(nn.Module):
    """Tokens (B, T, D), conditioning (B, D) -> tokens (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D, heads, self.rung = config.width, config.heads, config.rung
        self.t = config.residual_t
        self.norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6) if self.rung < "G" else nn.Identity()
        if self.rung < "D":
            self.attention = PlainAttention(D, heads) if self.rung < "B" else CosineAttention(config)
        else:
            self.attention = MPAttention(D, heads)
        self.mlp = GELUMLP(config) if self.rung < "F" else MPMLP(D, 4 * D)
        self.modulation1 = ZeroModulation(config, 3) if self.rung < "E" else Modulation(D, config.modulation)
        self.modulation2 = ZeroModulation(config, 3) if self.rung < "E" else Modulation(D, config.modulation)

    def forward(self, x, cond):
        theta1, scale1, shift1, gate1 = self.modulation1(cond)
        theta2, scale2, shift2, gate2 = self.modulation2(cond)
        x = self.join(x, gate1, self.attention(modulate(self.norm(x), theta1, scale1, shift1)))
        x = self.join(x, gate2, self.mlp(modulate(self.norm(x), theta2, scale2, shift2)))
        return x

    def join(self, x, gate, branch):
        return mp_sum(x, (1 + gate) * branch, t=self.t) if self.rung >= "E" else x + gate * branch


class Output(nn.Module):
    """Tokens (B, T, D), conditioning (B, D) -> patches (B, T, C·P²), zero at initialisation."""

    def __init__(self, config):
        super().__init__()
        D, rung = config.width, config.rung
        self.norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6) if rung < "G" else normalize
        self.modulation = ZeroModulation(config, 2) if rung < "E" else Modulation(D, ("scale", "shift"))
        self.linear = linear(rung)(D, config.channels * config.patch**2)
        self.gain = nn.Parameter(torch.zeros(())) if rung >= "C" else None

    def forward(self, x, cond):
        theta, scale, shift, _ = self.modulation(cond)
        x = self.linear(modulate(self.norm(x), theta, scale, shift))
        return x if self.gain is None else self.gain * x


def init_plain(net):
    """DiT's initialisation, as in model.py, for rungs A and B."""
    init_linears(net)
    for layer in net.input.noise:
        nn.init.normal_(layer.weight, std=0.02)
    for layer in (net.output.linear,
                  *(module.linear for module in net.modules() if isinstance(module, ZeroModulation))):
        nn.init.zeros_(layer.weight)
