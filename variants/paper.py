"""The paper's own network, as its public code has it: `python train.py --variant=paper --config=configs/compare.toml`.

What the network of model.py does otherwise stands in the table at the end of that file. Here it is as in the branch
old-mod_opts of the paper's code, whose runs made the rotation table, apart from three things: the noise level enters as
ln(sigma)/4, not as an integer time; the output has no rows for a learned variance; and a plane of a rotation is made by
channels i and i + D/2, not by neighbours, which is the same network with its channels, and those of the positions, in
another order. Loss, optimizer and averages are this repository's. One scalar gain for each kind of a modulation is the
paper's, too, and since rows of an MPLinear do not know of each other, one matrix for all kinds is the same as one for
each.

With size S, patches of 4×4 and 1,000 classes of 4×16×16 latents it has 32,825,163 parameters with scale, shift, gate,
and 30,981,963 with scale, rotate, gate; the learned variance adds 24,576.

Source: [MaP-DiT] Bill et al. 2025, arXiv 2505.19122. Read this file beside model.py, whose legend is used.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from layers import MPAttention, MPEmbedding, MPFourier, MPLinear, attention, mp_silu, mp_sum, normalize
from model import DiT, DiTConfig, MPBlock, MPOutput, position_embedding
from plumbing.keys import key


@dataclass
class Config(DiTConfig):
    residual_t: float = key(0.3, "share t of a branch in residual sums, the same at any depth", 1e-6, 0.99)

    def __post_init__(self):
        super().__post_init__()
        if self.block != "mp":
            raise ValueError("block: leave it out, the paper's network is the magnitude-preserving one")

    def network(self):
        return DiT(self, (Input, Block, Output))


class Input(nn.Module):
    """Patches (B, T, C·P²), c_noise (B,), labels (B,) -> tokens (B, T, D), conditioning (B, D)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.patch = MPLinear(config.channels * config.patch**2 + 1, D)
        self.fourier = MPFourier(256)
        self.noise1, self.noise2 = MPLinear(256, D), MPLinear(D, D)
        self.label = MPEmbedding(config.num_classes + 1, D)
        position = position_embedding(D, config.image_size // config.patch)
        position = normalize(position - position.mean(dim=1, keepdim=True))  # over the channels of a token
        neighbours = torch.arange(D).view(-1, 2).T.flatten()  # 0, 2, ... then 1, 3, ...: see above
        self.register_buffer("position", position[:, neighbours])

    def forward(self, patches, c_noise, labels):
        ones = torch.ones_like(patches[..., :1])  # act as a bias
        x = mp_sum(self.patch(torch.cat([patches, ones], dim=-1)), self.position, t=0.5)
        waves = self.fourier(c_noise) / 2**0.5  # there without the factor sqrt(2)
        noise = self.noise2(mp_silu(self.noise1(waves)))
        cond = mp_silu(mp_sum(noise, self.label(labels), t=0.5))
        return x, cond


class Attention(MPAttention):
    """Multi-head attention, (B, T, D) -> (B, T, D). q and k have RMS 1 per head, v is as it comes."""

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        x = attention(normalize(q), normalize(k), v)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, D)


class Block(MPBlock):
    """Tokens (B, T, D), conditioning (B, D) -> tokens (B, T, D)."""

    def __init__(self, config):
        super().__init__(config)
        self.attention = Attention(config.width, config.heads)


class Output(MPOutput):
    """Tokens (B, T, D), conditioning (B, D) -> patches (B, T, C·P²), zero at initialisation. Tokens enter as they are,
    whatever their RMS."""

    def forward(self, x, cond):
        return self.gain * self.linear(self.modulation(x, cond))
