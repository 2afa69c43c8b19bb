"""muP: tune the learning rate on a narrow network, and use it on a wide one [DiT-muP].

    python train.py --config=configs/mup.toml --out=out/mup-256 --model.width=256 --model.heads=8
    python -m variants.mup                       # the coordinate check: a table and a plot

With base width W0, width W and Adam, a learning rate tuned at W0 is to hold at W if

- plain: hidden weights learn at rate × W0/W, and the output is multiplied by W0/W (its bias, not meant by it, learns at rate
  × W/W0). Initialisation needs variance 1/fan_in for hidden weights and a fixed one for input weights: DiT's is put right
  where it is not so.
- magnitude-preserving: hidden weights learn at rate × sqrt(W0/W). They keep RMS 1 and act divided by sqrt(fan_in), so that
  much of the rule is built in. The output is multiplied by sqrt(W0/W). That is our addition: muP wants output weights of
  variance 1/fan_in², those of an MPLinear act with 1/fan_in, and only their gain starts at zero. Without the multiplier,
  what the blocks learn along a row of them, and what the row itself learns, would reach the output × sqrt(W/W0).

Hidden are weights whose fan_in and fan_out both grow with the width: all linear layers but those of patches and output (here
also the noise level comes in as W features). Heads should grow with the width, each keeping its size.

The coordinate check: how much do a few steps change what each block puts out for a fixed batch? With muP that should not depend
on the width. Its learning rates are low, so that changes still add up: once nothing is left of what a magnitude-preserving
block put out before, the change is sqrt(2) and says no more about width.

Sources: [DiT-muP] Zheng et al. 2025, arXiv 2505.15270; [EDM2] Karras et al. 2024, arXiv 2312.02696.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from data import batch_indices, load_dataset
from fid import save_plot
from layers import MPLinear, force_weight_normalization
from model import DiT, DiTConfig, edm2_loss, key
from train import TrainConfig, build, draw_batch, optimizer_step


@dataclass
class Config(DiTConfig):
    base_width: int = key(64, "the width that the learning rate was tuned at; let heads grow with the width")

    def __post_init__(self):
        super().__post_init__()
        if self.base_width < 1:
            raise ValueError(f"base_width: {self.base_width} is not positive")

    def network(self):
        return MuDiT(self)


class MuDiT(DiT):
    """The network of model.py, parametrised so that its best learning rate should not depend on its width."""

    def __init__(self, config):
        super().__init__(config)
        self.growth = config.width / config.base_width
        self.scale = 1 / self.growth if config.block == "plain" else self.growth**-0.5     # of hidden rates and of the output
        if config.block == "plain":
            inputs, (first, _, second) = self.input.patch, self.input.noise
            with torch.no_grad():                                           # wider, Xavier makes it smaller, N(0, 0.02²) too large
                inputs.weight *= math.sqrt((inputs.in_features + config.width) / (inputs.in_features + config.base_width))
                first.weight *= self.growth**-0.5
                second.weight *= self.growth**-0.5

    @property
    def rates(self):
        rates = {module.weight: self.scale for module in self.modules() if isinstance(module, (nn.Linear, MPLinear))
                 and module not in (self.input.patch, self.output.linear)}
        if self.config.block == "plain":                                    # the multiplier is not meant for the bias
            rates[self.output.linear.bias] = self.growth
        return rates

    def forward(self, x, c_noise, labels):
        return super().forward(x, c_noise, labels) * self.scale


# ---- the coordinate check ----

def block_changes(config, dataset, steps):
    """By how much `steps` steps change what each block puts out for a fixed batch, and the network: (depth + 1,), RMS."""
    denoiser, _, optimizer = build(config, torch.device("cpu"))
    weights, outputs = force_weight_normalization(denoiser), []
    for part in (*denoiser.net.blocks, denoiser.net):
        part.register_forward_hook(lambda part, inputs, output: outputs.append(output.detach()))

    def draw(step):
        indices = batch_indices(len(dataset), config.seed, step * config.batch, config.batch)
        return draw_batch(config, dataset, dataset.images[indices], dataset.labels[indices], step, slice(0, config.batch), torch.device("cpu"))

    images, labels, sigma, noise = draw(steps)

    def look():
        outputs.clear()
        with torch.no_grad():
            denoiser(images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
        return list(outputs)

    before = look()
    for step in range(steps):
        optimizer.zero_grad()
        edm2_loss(denoiser, denoiser.uncertainty, *draw(step)).backward()
        optimizer_step(optimizer, weights, config.learning_rate)
    return [(a - b).square().mean().sqrt().item() for a, b in zip(look(), before)]


def coordinate_check(widths, steps, seeds, path):
    """For both families, without and with muP, print by how much blocks and output change at each width, and plot the last block."""
    dataset, curves = load_dataset("digits"), {}
    for block, learning_rate in (("plain", 0.0003), ("mp", 0.002)):
        for variant, Class in (("without", DiTConfig), ("with muP", Config)):
            changes = []
            print(f"\n{block} {variant}".ljust(21) + "  block 1  block 2  block 3  block 4   output", flush=True)
            for width in widths:
                more = {"base_width": widths[0]} if Class is Config else {}
                model = Class(block=block, width=width, heads=width // 32, depth=4, **more).fit(8, 1, 10)
                configs = [TrainConfig(seed=seed, learning_rate=learning_rate, model=model) for seed in range(seeds)]
                changes.append(np.mean([block_changes(config, dataset, steps) for config in configs], axis=0))
                print(f"width {width}".ljust(20) + "".join(f"{change:9.4f}" for change in changes[-1]), flush=True)
            slopes = np.polyfit(np.log(widths), np.log(changes), 1)[0]
            print("slope in log-log".ljust(20) + "".join(f"{slope:9.2f}" for slope in slopes), flush=True)
            curves[f"{block} {variant}"] = [math.log2(change[-2] / changes[0][-2]) for change in changes]
    doublings = [math.log2(width / widths[0]) for width in widths]
    save_plot(doublings, curves, ("doublings of the width", "doublings of the last block's change"), path)
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="multiples of 32, growing, the first being the base (default: 64 128 256)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps before looking (default: 20)")
    parser.add_argument("--seeds", type=int, default=8, help="runs to average over; a slope from a single one may be off by 0.2 (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("out/mup.png"), help="where the plot goes (default: out/mup.png)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if len(args.widths) < 2 or args.widths != sorted(set(args.widths)) or any(width < 32 or width % 32 for width in args.widths):
            raise ValueError("--widths: must be two or more multiples of 32, growing")
        if args.steps < 2 or args.seeds < 1:                                # the first step moves nothing but the output
            raise ValueError("needs at least two steps and one seed")
        if args.out.suffix != ".png" or args.out.is_dir():
            raise ValueError(f"--out: {args.out} is not the name of a .png file")
        args.out.parent.mkdir(parents=True, exist_ok=True)                  # now rather than after all the work
        coordinate_check(args.widths, args.steps, args.seeds, args.out)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}" if error.filename else str(error))


if __name__ == "__main__":
    main()
