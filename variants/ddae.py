"""Self-conditioning and contrastive self-distillation: a denoiser that uses, and sharpens, what it knows of an image.

    python train.py --config=configs/ddae.toml
    python -m tools.probe out/ddae               # linear probe: what each block knows, by noise level

Self-conditioning: the tokens after the middle block are averaged and normalised. This summary s is added to the
conditioning of all later blocks.

Contrastive self-distillation, if `contrast` is set: an EMA of the network, the teacher, computes s for a second view of
every image. The student's s for an image must be closer to the teacher's s for the same image than to the teacher's s
for the other images of the batch (InfoNCE).

Source: [DDAE++] Xiang et al. 2025, arXiv 2505.10999. The paper leaves some details open, and we chose them ourselves:

- s is added by mp_sum with t = 0.3, in the plain family by a linear layer that starts at zero.
- A view is the image moved by up to an eighth of its side. The student sees the training images at the training's noise
  levels, the teacher sees the views at noise level 0.2 and without labels.
- A projector of two layers maps s to 64 dimensions. The temperature is 0.2.
- The other images are those of the same micro-batch. So this loss depends on how the batch is split; no other part of
  the training does. The log reports the loss without this part.

Legend: B batch, C channels, S side, T tokens, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import MPMLP, MPLinear, mp_sum, normalize
from model import DiT, DiTConfig
from plumbing.keys import key


@dataclass
class SummaryKeys:
    """The keys of the two parts, apart so that every network with a conditioning vector can have them."""

    self_conditioning: bool = key(False, "condition later blocks on a summary of the middle one")
    contrast: float = key(0.0, "weight of the contrastive loss (0: none), which needs several images in a micro-batch",
                          0, 1e3)


@dataclass
class Config(SummaryKeys, DiTConfig):
    self_conditioning: bool = key(True, "condition later blocks on a summary of the middle one")
    bottleneck: int = key(0, "the block to summarise, from 1 to depth - 1 (0: the middle, depth // 2)", 0, 1000)

    def __post_init__(self):
        super().__post_init__()
        self.bottleneck = self.bottleneck or self.depth // 2
        if not 1 <= self.bottleneck < self.depth:
            raise ValueError(f"bottleneck: {self.bottleneck} does not leave a block before and one after, "
                             f"of {self.depth}")

    def network(self):
        return SelfConditionedDiT(self)


class Summarising:
    """What a network inherits to condition its later blocks on a summary. Why apart: other networks can have it too.

    summary: the s of the latest forward pass, (B, D).
    """

    VIEW_SIGMA, TEMPERATURE, DIMENSIONS = 0.2, 0.2, 64

    def add_summary(self, D, E):
        """Make the layers, for tokens of width D and conditioning of width E. To be called once self.config is set."""
        mp = self.config.block == "mp"
        if self.config.self_conditioning:
            self.condition = MPLinear(D, E) if mp else nn.Linear(D, E)
            if not mp:
                nn.init.zeros_(self.condition.weight)
                nn.init.zeros_(self.condition.bias)
        if self.config.contrast:
            self.projector = nn.Sequential(*((MPMLP(D, D), MPLinear(D, self.DIMENSIONS)) if mp else
                                             (nn.Linear(D, D), nn.SiLU(), nn.Linear(D, self.DIMENSIONS))))

    def summarise(self, x, cond):
        """Tokens (B, T, D) after the middle block, conditioning (B, E) -> the conditioning of later blocks (B, E)."""
        self.summary = normalize(x.float().mean(1))
        if not self.config.self_conditioning:
            return cond
        summary_cond = self.condition(self.summary)
        return mp_sum(cond, summary_cond, t=0.3) if self.config.block == "mp" else cond + summary_cond

    def extra_loss(self, teacher, images, generator):
        """InfoNCE between the student's latest s and the teacher's s for another view of `images` (B, C, S, S)."""
        s, self.summary = self.summary, None  # so that autograd's graph can be freed
        if not self.config.contrast:
            return 0.0
        features = F.normalize(self.projector(s), dim=1)
        with torch.no_grad():
            noise = torch.randn(images.shape, generator=generator, device=images.device)
            teacher(shifted(images, generator) + self.VIEW_SIGMA * noise, self.VIEW_SIGMA)
            teacher_features = F.normalize(teacher.net.projector(teacher.net.summary), dim=1)
        own = torch.arange(len(images), device=images.device)
        return self.config.contrast * F.cross_entropy(features @ teacher_features.T / self.TEMPERATURE, own)


class SelfConditionedDiT(Summarising, DiT):
    """The network of model.py, its later blocks conditioned on a summary of the middle one."""

    def __init__(self, config):
        super().__init__(config)
        self.add_summary(config.width, config.width)

    def run_blocks(self, x, cond):
        for number, block in enumerate(self.blocks, 1):
            x = block(x, cond)
            if number == self.config.bottleneck:
                cond = self.summarise(x, cond)
        return x


def shifted(images, generator):
    """Move each image (B, C, S, S) by up to an eighth of its side, up or down and left or right; repeat its border."""
    B, S = len(images), images.shape[-1]
    reach = max(S // 8, 1)
    windows = F.pad(images, (reach,) * 4, mode="replicate").unfold(2, S, 1).unfold(3, S, 1)  # (B, C, R, R, S, S)
    down, right = torch.randint(2 * reach + 1, (2, B), generator=generator, device=images.device)
    return windows[torch.arange(B, device=images.device), :, down, right]
