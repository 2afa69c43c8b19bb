"""muP: tune the learning rate on a narrow network, and use it on a wide one [DiT-muP].

    python train.py --config=configs/mup.toml --model.width=256 --model.heads=8
    python -m variants.mup                       # the coordinate check: a table and a plot

With base width W0, width W and Adam, a learning rate tuned at W0 holds at W if

- plain: hidden weights learn at rate × W0/W, and the output is multiplied by W0/W. Initialisation needs variance 1/fan_in
  for hidden weights and a fixed one for input weights: DiT's is put right where it is not so.
- magnitude-preserving: hidden weights learn at rate × sqrt(W0/W). They keep RMS 1 and act divided by sqrt(fan_in), so
  that much of the rule is built in; EDM2's published rates follow it. The output is multiplied by sqrt(W0/W). That is our
  addition: muP wants output weights of variance 1/fan_in², and those of an MPLinear act with 1/fan_in. They cannot start at
  zero, only their gain does, so that without it what the blocks learn in their direction counts for more, the wider it is.

Hidden are weights whose fan_in grows with the width: all linear layers but those of patches and output (here also the noise
level comes in as W features). Heads should grow with the width, each keeping its size.

Sources: [DiT-muP] Zheng et al. 2025, arXiv 2505.15270; [EDM2] Karras et al. 2024, arXiv 2312.02696.
"""

import argparse
import math
from dataclasses import dataclass, replace
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
    base_width: int = key(64, "the width that the learning rate was tuned at")

    def __post_init__(self):
        super().__post_init__()
        if self.base_width < 1:
            raise ValueError(f"base_width: {self.base_width} is not positive")

    def network(self):
        return MuDiT(self)


class MuDiT(DiT):
    """The network of model.py, parametrised so that its best learning rate does not depend on its width."""

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

    def look():
        outputs.clear()
        with torch.no_grad():
            edm2_loss(denoiser, denoiser.uncertainty, *draw(steps))
        return list(outputs)

    before = look()
    for step in range(steps):
        optimizer.zero_grad()
        edm2_loss(denoiser, denoiser.uncertainty, *draw(step)).backward()
        optimizer_step(optimizer, weights, config.learning_rate)
    return [(a - b).square().mean().sqrt().item() for a, b in zip(look(), before)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="multiples of 32, the first being the base")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps before looking (default: 20)")
    parser.add_argument("--seeds", type=int, default=8, help="runs to average over (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("out/mup.png"), help="where the plot goes (default: out/mup.png)")
    args = parser.parse_args()
    if len(set(args.widths)) < 2 or any(width < 32 or width % 32 for width in args.widths) or min(args.steps, args.seeds) < 1:
        parser.error("needs two or more widths, multiples of 32, and at least one step and one seed")
    dataset, curves = load_dataset("digits"), {}
    torch.set_num_threads(1)
    for block, learning_rate in (("plain", 0.0003), ("mp", 0.003)):
        for variant, Class in (("without", DiTConfig), ("with muP", Config)):
            table = []
            print(f"\n{block} {variant}".ljust(21) + "  block 1  block 2  block 3  block 4   output", flush=True)
            for width in args.widths:
                more = {"base_width": args.widths[0]} if Class is Config else {}
                model = Class(block=block, width=width, heads=width // 32, depth=4, **more).fit(8, 1, 10)
                config = TrainConfig(learning_rate=learning_rate, model=model)
                table.append(np.mean([block_changes(replace(config, seed=seed), dataset, args.steps) for seed in range(args.seeds)], axis=0))
                print(f"width {width}".ljust(20) + "".join(f"{change:9.4f}" for change in table[-1]), flush=True)
            table = np.array(table)                                         # (widths, blocks and output)
            slopes = np.polyfit(np.log(args.widths), np.log(table), 1)[0]
            print("slope".ljust(20) + "".join(f"{slope:9.2f}" for slope in slopes), flush=True)
            curves[f"{block} {variant}"] = np.log2(table[:, -2] / table[0, -2])
    save_plot(args.widths, curves, ("width", "change of the last block's output, doublings since the base width"), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
