"""U-ViT: a transformer with long skips whose conditions are tokens: `python train.py --config=configs/uvit.toml`.

Source: [U-ViT] Bao et al. 2023, arXiv 2209.12152. The mp family, Fourier features as the token of the noise level, the
label token where there are no classes, biases and initial values are our choices. The legend is that of model.py.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from layers import MPMLP, MPAttention, MPEmbedding, MPFourier, MPLinear, mp_sum
from model import DiTConfig, PlainAttention, init_linears
from plumbing.keys import key
from variants import scalelong, unet


@dataclass
class Config(scalelong.Config):
    skip_scaling: str = key("none", "factor on the long skips, 1 in the paper", choices=scalelong.SCALINGS)

    def __post_init__(self):
        super().__post_init__()
        if self.modulation != DiTConfig.modulation:
            raise ValueError("modulation: leave it out, the conditions of U-ViT are tokens")

    def network(self):
        return UViT(self)


class Input(nn.Module):
    """Patches (B, T, C·P²), noise levels (B,), labels (B,) -> tokens (B, 2 + T, D), and no conditioning vector."""

    def __init__(self, config):
        super().__init__()
        D, self.mp = config.width, config.block == "mp"
        Linear, Embedding = (MPLinear, MPEmbedding) if self.mp else (nn.Linear, nn.Embedding)
        self.fourier = MPFourier(D)
        self.label = Embedding(config.num_classes + 1, D)
        self.patch = Linear(config.channels * config.patch**2, D)
        self.position = Embedding(2 + config.tokens, D)  # in the mp family it is also the bias
        init_linears(self)

    def forward(self, patches, c_noise, labels):
        x = torch.cat([self.fourier(c_noise)[:, None], self.label(labels)[:, None], self.patch(patches)], dim=1)
        position = self.position(torch.arange(x.shape[1], device=x.device))
        return mp_sum(x, position, t=0.5) if self.mp else x + position, None


class Block(nn.Module):
    """Tokens (B, 2 + T, D) -> tokens (B, 2 + T, D). cond: None."""

    def __init__(self, config):
        super().__init__()
        D, H, self.mp, self.t = config.width, config.heads, config.block == "mp", config.residual_t
        if self.mp:
            self.attention, self.mlp = MPAttention(D, H), MPMLP(D, 4 * D)
        else:
            self.attention = nn.Sequential(nn.LayerNorm(D), PlainAttention(D, H))
            self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        init_linears(self)

    def forward(self, x, cond):
        for branch in (self.attention, self.mlp):
            x = mp_sum(x, branch(x), t=self.t) if self.mp else x + branch(x)
        return x


class Output(nn.Module):
    """Tokens (B, 2 + T, D) -> patches (B, T, C·P²). cond: None."""

    def __init__(self, config):
        super().__init__()
        D, values = config.width, config.channels * config.patch**2
        self.norm = nn.Identity() if config.block == "mp" else nn.LayerNorm(D)
        self.linear = MPLinear(D, values) if config.block == "mp" else nn.Linear(D, values)
        if config.block == "plain":
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, x, cond):
        return self.linear(self.norm(x[:, 2:]))


class UViT(scalelong.LongSkipDiT):
    """The raw network F, inputs and output as in DiT. Why: it shows how far a network gets without modulation."""

    def __init__(self, config):
        super().__init__(config, (Input, Block, Output), extra_tokens=2)
        C = config.channels
        if config.block == "mp":
            self.conv, self.gain = unet.MPConv(C, C), nn.Parameter(torch.zeros(()))
            self.conv.weight.data = 3 * C**0.5 * nn.functional.pad(torch.eye(C), (4 * C, 4 * C))  # the identity
        else:
            self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
            nn.init.dirac_(self.conv.weight)

    def forward(self, x, c_noise, labels):
        x = super().forward(x, c_noise, labels)  # (B, C, S, S)
        return self.conv(x) if self.config.block == "plain" else self.gain * self.conv(x.movedim(1, 3)).movedim(3, 1)
