"""Self-conditioning and contrastive self-distillation: a denoiser that uses, and sharpens, what it knows of an image.

    python train.py --config=configs/ddae.toml
    python -m variants.ddae out/ddae             # linear probe: what each block knows, by noise level

Self-conditioning: s, the mean of the tokens after the middle block, normalised, joins the conditioning of all later blocks.
Contrastive self-distillation, if `contrast` is set: the s of the training forward pass should tell which image it is, by matching
the s that the EMA network gives to another view of it rather than those of the batch's other images (InfoNCE).

Source: [DDAE++] Xiang et al. 2025, arXiv 2505.10999. Where its public details are thin, these are our choices: s joins by
mp_sum with t = 0.3, or by a zero-initialised linear in the plain block; a view is an image moved by up to an eighth of its side, at
noise level 0.2 for the teacher and at that of the training for the student, without label for the teacher; a projector of two
layers into 64 dimensions; temperature 0.2; negatives are those of the micro-batch, so that this loss, unlike the rest
of the training, depends on how the batch is split. The loss that is logged leaves it out.

Legend: B batch, C channels, S side, T tokens, D width.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import epoch_order, to_network
from fid import dataset_of
from layers import MPMLP, MPLinear, mp_sum, normalize
from model import DiT, DiTConfig, key
from sample import choose_device, load_denoiser, newest_run


@dataclass
class Config(DiTConfig):
    self_conditioning: bool = key(True, "later blocks are told what the middle one knows")
    bottleneck: int = key(0, "the block after which to ask, from 1 to depth - 1 (0: the middle, depth // 2)")
    contrast: float = key(0.0, "weight of the contrastive loss (0: none), which needs several images in a micro-batch")

    def __post_init__(self):
        super().__post_init__()
        self.bottleneck = self.bottleneck or self.depth // 2
        if not 1 <= self.bottleneck < self.depth:
            raise ValueError(f"bottleneck: {self.bottleneck} does not leave a block before and one after, of {self.depth}")
        if not 0 <= self.contrast < float("inf"):
            raise ValueError(f"contrast: {self.contrast} is not a weight")

    def network(self):
        return SelfConditionedDiT(self)


class SelfConditionedDiT(DiT):
    """The network of model.py, conditioned on its own middle; `summary` (B, D) is the s of its latest forward pass."""

    VIEW_SIGMA, TEMPERATURE, DIMENSIONS = 0.2, 0.2, 64

    def __init__(self, config):
        super().__init__(config)
        D, mp = config.width, config.block == "mp"
        if config.self_conditioning:
            self.tell = MPLinear(D, D) if mp else nn.Linear(D, D)
            if not mp:
                nn.init.zeros_(self.tell.weight)
                nn.init.zeros_(self.tell.bias)
        if config.contrast:
            self.projector = nn.Sequential(*((MPMLP(D, D), MPLinear(D, self.DIMENSIONS)) if mp else
                                             (nn.Linear(D, D), nn.SiLU(), nn.Linear(D, self.DIMENSIONS))))

    def middle(self, x, cond):
        for number, block in enumerate(self.blocks, 1):
            x = block(x, cond)
            if number == self.config.bottleneck:
                self.summary = normalize(x.float().mean(1))
                if self.config.self_conditioning:
                    told = self.tell(self.summary)
                    cond = mp_sum(cond, told, t=0.3) if self.config.block == "mp" else cond + told
        return x

    def extra_loss(self, teacher, images, seed):
        """InfoNCE between the student's latest s and the teacher's for another view of the same images (B, C, S, S)."""
        s, self.summary = self.summary, None                                # lets go of the graph
        if not self.config.contrast:
            return 0.0
        ours = F.normalize(self.projector(s), dim=1)
        with torch.no_grad():
            generator = torch.Generator(images.device).manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
            noise = torch.randn(images.shape, generator=generator, device=images.device)
            teacher(moved(images, generator) + self.VIEW_SIGMA * noise, self.VIEW_SIGMA)
            theirs = F.normalize(teacher.net.projector(teacher.net.summary), dim=1)
        return self.config.contrast * F.cross_entropy(ours @ theirs.T / self.TEMPERATURE, torch.arange(len(images), device=images.device))


def moved(images, generator):
    """Images (B, C, S, S), each moved by up to an eighth of its side in both directions, its border repeated."""
    B, S = len(images), images.shape[-1]
    reach = max(S // 8, 1)
    windows = F.pad(images, (reach,) * 4, mode="replicate").unfold(2, S, 1).unfold(3, S, 1)     # (B, C, 2·reach + 1, 2·reach + 1, S, S)
    down, right = torch.randint(2 * reach + 1, (2, B), generator=generator, device=images.device)
    return windows[torch.arange(B, device=images.device), :, down, right]


# ---- the linear probe ----

@torch.no_grad()
def block_features(denoiser, images, sigma):
    """Mean over tokens of what each block puts out for noisy images, unconditional: (depth, N, D)."""
    features, generator = [[] for _ in denoiser.net.blocks], torch.Generator(images.device).manual_seed(0)
    hooks = [block.register_forward_hook(lambda block, inputs, x, kept=kept: kept.append(x.mean(1).float()))
             for block, kept in zip(denoiser.net.blocks, features)]
    for part in images.split(256):
        denoiser(part + sigma * torch.randn(part.shape, generator=generator, device=part.device), sigma)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(kept) for kept in features])


def probe(features, labels, held_out, classes):
    """Accuracy on the rows `held_out` (bool, N) of a logistic regression from features (N, D) fitted on the others."""
    mean, std = features[~held_out].mean(0), features[~held_out].std(0).clamp(min=1e-6)
    x = (features - mean) / std
    weight = torch.zeros(classes, x.shape[1] + 1, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def logits(x):
        return x @ weight[:, 1:].T + weight[:, 0]

    def loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(x[~held_out]), labels[~held_out]) + 1e-3 * weight[:, 1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(loss)
    return (logits(x[held_out]).argmax(1) == labels[held_out]).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="run directory (default: the newest under out/)")
    parser.add_argument("--ema", type=float, metavar="STD", help="EMA width (default: the widest in training)")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5, 1.0], help="noise levels (default: 0.05 0.1 0.2 0.5 1)")
    parser.add_argument("--images", type=int, default=10000, help="how many to take at most; a fifth is held out (default: 10000)")
    parser.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args()
    try:
        if not all(0 < sigma < float("inf") for sigma in args.sigma) or args.images < 10:
            raise ValueError("noise levels must be positive, and the images at least 10")
        device, run = choose_device(args.device), args.run or newest_run()
        denoiser, stats = load_denoiser(run, device, args.ema)
        name, dataset = dataset_of(run)
        if dataset.num_classes < 2:
            raise ValueError(f"{name} has no labels to probe for")
        if dataset.latent:
            raise ValueError(f"{name} holds latents; the probe takes images")
    except ValueError as error:
        parser.error(str(error))
    order = epoch_order(len(dataset), 0, 0)[:args.images]
    (images, labels), = dataset.feed([order], device)
    held_out = torch.arange(len(order), device=device) % 5 == 0
    print(f"accuracy on {held_out.sum()} held-out images, of a linear probe fitted on {(~held_out).sum()}")
    print("sigma".ljust(8) + "".join(f"block {number + 1}".rjust(10) for number in range(len(denoiser.net.blocks))))
    for sigma in args.sigma:
        features = block_features(denoiser, to_network(images, stats), sigma)
        accuracies = [probe(x, labels, held_out, dataset.num_classes) for x in features]
        print(f"{sigma:<8g}" + "".join(f"{accuracy:10.1%}" for accuracy in accuracies), flush=True)


if __name__ == "__main__":
    main()
