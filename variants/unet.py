"""The magnitude-preserving U-Net of EDM2, configuration G: the convolutional network beside the transformers.

    python train.py --config=configs/unet.toml

The encoder goes down through levels of growing width and falling resolution, and the decoder goes up again. The output
of the input convolution and of each block of the encoder is a skip. The decoder joins the skips to its input by mp_cat,
the last one first. The share of a skip is t = s/(1+s), with a factor s of scalelong.py; s = 1 is the paper's t = 0.5.
Self-conditioning and contrast are those of ddae.py; the summary is taken in the middle, before the first join.

Read layers.py and scalelong.py before. The functions of layers.py work on the last dimension, so feature maps have
their channels there. A 1×1 convolution is then an MPLinear, and attention sees a feature map's pixels as tokens.

Source: [EDM2] Karras et al. 2024, arXiv 2312.02696, figure 21. Differences: those to EDM2 in the table of model.py; no
dropout; one attention head where a width is no multiple of 64; main path and modulation in float32.

Legend: B batch, S side of a feature map, C channels, E width of the conditioning.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import MPAttention, MPFourier, MPLinear, mp_cat, mp_silu, mp_sum, normalize
from model import NetworkConfig, matrices_of
from plumbing.keys import key
from variants.ddae import Summarising, SummaryKeys
from variants.scalelong import SkipKeys, SkipScales


@dataclass
class Config(SkipKeys, SummaryKeys, NetworkConfig):
    block: str = key("mp", "family: mp (magnitude-preserving), the only one here", choices=("mp",))
    base: int = key(192, "channels of the first level", 1, 16384)
    multipliers: tuple[int, ...] = key((1, 2, 3, 4), "channels of each level, in multiples of base", 1, 64)
    blocks: int = key(3, "blocks of a level in the encoder; the decoder has one more", 1, 100)
    attention: tuple[int, ...] = key((16, 8), "sides of the feature maps whose blocks have attention", 1, 8192)

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % 2**(len(self.multipliers) - 1):
            raise ValueError(f"multipliers: side {self.image_size} cannot be halved {len(self.multipliers) - 1} times")

    def network(self):
        return UNet(self)


class MPConv(MPLinear):
    """3×3 convolution without bias, (B, S, S, C) -> (B, S, S, fan_out). A row of its weight, (fan_out, 3·3·C), is the
    whole kernel of an output channel. Why an MPLinear: force_weight_normalization() then finds it."""

    def __init__(self, channels, fan_out):
        super().__init__(3 * 3 * channels, fan_out)

    def forward(self, x):
        kernels = self.unit_rows().unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)  # (fan_out, C, 3, 3)
        return F.conv2d(x.permute(0, 3, 1, 2), kernels, padding=1).permute(0, 2, 3, 1)


def downsample(x):
    """Means of 2×2 pixels, (B, S, S, C) -> (B, S/2, S/2, C), as the input of a lower level."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))


def upsample(x):
    """Each pixel four times, (B, S, S, C) -> (B, 2S, 2S, C), as the input of a higher level."""
    return x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


class Block(nn.Module):
    """Feature map (B, S, S, C + skip), conditioning (B, E) -> feature map (B, S', S', width).
    kind: "encoder" or "decoder". resample: downsample, upsample or None. skip: how many input channels are a skip's.
    Why normalised in the encoder: its outputs are the skips, and each should enter its join at RMS 1 or close to it.
    """

    def __init__(self, kind, C, width, E, resample=None, attention=False, skip=0):
        super().__init__()
        self.kind, self.resample, self.skip = kind, resample, skip
        self.main = MPLinear(C + skip, width) if C + skip != width else nn.Identity()
        self.conv1 = MPConv(width if kind == "encoder" else C + skip, width)
        self.scale, self.gain = MPLinear(E, width), nn.Parameter(torch.zeros(()))
        self.conv2 = MPConv(width, width)
        self.attention = MPAttention(width, 1 if width % 64 else width // 64) if attention else None

    def branch(self, x, cond):
        scale = self.gain * self.scale(cond).float()[:, None, None]  # (B, 1, 1, width)
        return self.conv2(mp_silu(self.conv1(mp_silu(x)) * (1 + scale)))

    def forward(self, x, cond):
        x = self.resample(x) if self.resample else x
        if self.kind == "encoder":
            x = normalize(self.main(x).float())  # float: the main path is not in bfloat16
            x = mp_sum(x, self.branch(x, cond), t=0.3)
        else:
            x = mp_sum(self.main(x).float(), self.branch(x, cond), t=0.3)
        if self.attention:
            x = mp_sum(x, self.attention(x.flatten(1, 2)).view(x.shape), t=0.3)
        return x.clamp(-256, 256)


class UNet(Summarising, nn.Module):
    """The raw network F: images (B, C, S, S), c_noise (B,), labels (B,) int64 -> (B, C, S, S). Label num_classes: null.
    Why: EDM2 found magnitude preservation on this network, and the transformers can be compared with it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = [config.base * multiplier for multiplier in config.multipliers]
        E, C, S = max(widths), widths[0], config.image_size
        self.noise = nn.Sequential(MPFourier(config.base), MPLinear(config.base, E))
        if config.num_classes:
            self.label = MPLinear(config.num_classes, E)
        self.input = MPConv(config.channels + 1, C)

        skips, encoder, decoder = [(C, S)], [], []  # skips: channels and side of each
        for width in widths:
            if encoder:  # in all levels but the first
                S = S // 2
                encoder.append(Block("encoder", C, C, E, resample=downsample))
                skips.append((C, S))
            for _ in range(config.blocks):
                encoder.append(Block("encoder", C, width, E, attention=S in config.attention))
                C = width
                skips.append((C, S))
        self.scales = SkipScales(config, [side**2 for _, side in skips])
        self.middle = len(encoder) + 1  # the last block before the first join
        self.add_summary(C, E)

        for width in reversed(widths):
            if decoder:
                S = 2 * S
                decoder.append(Block("decoder", C, C, E, resample=upsample))
            else:
                decoder += [Block("decoder", C, C, E, attention=True), Block("decoder", C, C, E)]
            for _ in range(config.blocks + 1):
                skip, _ = skips.pop()
                decoder.append(Block("decoder", C, width, E, attention=S in config.attention, skip=skip))
                C = width
        self.blocks = nn.ModuleList(encoder + decoder)
        self.output = MPConv(C, config.channels)
        self.gain = nn.Parameter(torch.zeros(()))

    @property
    def lr_scale(self):
        return self.scales.lr_scale

    @property
    def matrices(self):
        return matrices_of(self.blocks)

    def conditioning(self, c_noise, labels):
        """Noise levels (B,), labels (B,) -> (B, E)."""
        cond, count = self.noise(c_noise), self.config.num_classes
        if count:
            one_hot = labels[:, None] == torch.arange(count, device=labels.device)  # all zeros for the null label
            cond = mp_sum(cond, self.label(one_hot * math.sqrt(count)), t=0.5)
        return mp_silu(cond)

    def forward(self, x, c_noise, labels):
        cond, x = self.conditioning(c_noise, labels), x.permute(0, 2, 3, 1)
        x = self.input(torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)).float()  # the 1 acts as a bias
        skips = [x]
        for number, block in enumerate(self.blocks):
            if block.skip:
                skip = skips.pop()
                s = self.scales(len(skips), skip)
                x = mp_cat(x, skip, s / (1 + s))
            x = block(x, cond)
            if block.kind == "encoder":
                skips.append(x)
            if number == self.middle:
                cond = self.summarise(x.flatten(1, 2), cond)
        return self.gain * self.output(x).permute(0, 3, 1, 2)  # (B, C, S, S)
