"""muP: tune the learning rate on a narrow network, and use it on a wide one [DiT-muP].

    python train.py --config=configs/mup.toml --out=out/mup-256 --model.width=256 --model.heads=8
    python -m variants.mup                       # the coordinate check: a table and a plot

A learning rate tuned with Adam at the base width W0 should also be best at width W. This needs two changes.

- Plain family: hidden weights learn at rate × W0/W, and the output is multiplied by W0/W. The multiplier is not
  meant for the output's bias, so the bias learns at rate × W/W0. The initial variance must be 1/fan_in for hidden
  weights and independent of the width for input weights. DiT's initialisation is corrected where it differs.
- Magnitude-preserving family: hidden weights learn at rate × sqrt(W0/W). Their rows have RMS 1 and act divided by
  sqrt(fan_in), so most of the rule is built in. The output is multiplied by sqrt(W0/W), which is our addition: muP
  asks for output weights of variance 1/fan_in², but the rows of an MPLinear act with variance 1/fan_in and do not
  start at zero; only their gain does. Without the multiplier, the changes of the blocks' output along a row of the
  output layer, and the changes of the row itself, would reach the network's output × sqrt(W/W0).

Hidden weights are those whose fan_in and fan_out both grow with the width: all linear layers except those that read
patches and write the output. (The noise level enters as W features, so its layers are hidden ones.) The number of heads
should grow with the width, so that every head keeps its size.

The coordinate check measures how much a few steps change the output of each block for a fixed batch. With muP this
change should not depend on the width. The check uses low learning rates: once nothing is left of a magnitude-preserving
block's first output, the change is sqrt(2) at every width and shows nothing.

Sources: [DiT-muP] Zheng et al. 2025, arXiv 2505.15270; [EDM2] Karras et al. 2024, arXiv 2312.02696.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from data import batch_indices, load_dataset
from layers import MPLinear
from model import DiT, DiTConfig, edm2_loss
from plumbing.command import Parser, UserError, between, path_type, run_main
from plumbing.keys import key
from tools.plots import save_plot
from train import TrainConfig, build, draw_step, optimizer_step, prepare_batch


@dataclass
class Config(DiTConfig):
    base_width: int = key(64, "the width that the learning rate was tuned at; let heads grow with the width", 1, 16384)

    def network(self):
        return MuDiT(self)


class MuDiT(DiT):
    """The network of model.py, parametrised so that its best learning rate should not depend on its width."""

    def __init__(self, config):
        super().__init__(config)
        self.growth = config.width / config.base_width
        self.scale = 1 / self.growth if config.block == "plain" else self.growth**-0.5  # of hidden rates and output
        if config.block == "plain":
            inputs, (first, _, second) = self.input.patch, self.input.noise
            fan_in = inputs.in_features
            with torch.no_grad():  # with growing width, Xavier gets too small here and N(0, 0.02²) too large
                inputs.weight *= math.sqrt((fan_in + config.width) / (fan_in + config.base_width))
                first.weight *= self.growth**-0.5
                second.weight *= self.growth**-0.5

    @property
    def lr_scale(self):
        rates = super().lr_scale
        rates |= {module.weight: self.scale for module in self.modules() if isinstance(module, (nn.Linear, MPLinear))
                  and module not in (self.input.patch, self.output.linear)}
        if self.config.block == "plain":  # undoes the multiplier for the bias
            rates[self.output.linear.bias] = self.growth
        return rates

    def forward(self, x, c_noise, labels):
        return super().forward(x, c_noise, labels) * self.scale


# ---- the coordinate check ----

def block_changes(config, dataset, steps):
    """RMS of the change that `steps` training steps make to the output of each block, and of the network, for a fixed
    batch: a list of depth + 1 numbers."""
    device, outputs = torch.device("cpu"), []
    denoiser, _, optimizer = build(config, device)
    for part in (*denoiser.net.blocks, denoiser.net):
        part.register_forward_hook(lambda part, inputs, output: outputs.append(output.detach()))

    def draw(step):
        indices = batch_indices(len(dataset), config.seed, step * config.batch, config.batch)
        images, labels = torch.from_numpy(dataset.images[indices]), torch.from_numpy(dataset.labels[indices])
        draws = draw_step(config, dataset, step, device)
        return prepare_batch(config, dataset.facts, images, labels, draws, slice(0, config.batch))

    images, labels, sigma, noise = draw(steps)

    @torch.no_grad()
    def look():
        outputs.clear()
        denoiser(images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
        return list(outputs)

    before = look()
    for step in range(steps):
        optimizer.zero_grad()
        batch = draw(step)
        loss = edm2_loss(denoiser, denoiser.uncertainty(batch[2]), *batch)
        (loss * images[0].numel()).backward()
        optimizer_step(denoiser, optimizer, config.learning_rate)
    return [(a - b).square().mean().sqrt().item() for a, b in zip(look(), before)]


def coordinate_check(widths, steps, seeds, path):
    """Print the changes of blocks and output for both families, without and with muP; plot those of the last block."""
    dataset, curves = load_dataset("digits"), {}
    for block, learning_rate in (("plain", 0.0003), ("mp", 0.002)):
        for variant, Class in (("without", DiTConfig), ("with muP", Config)):
            changes = []
            print(f"\n{block} {variant}".ljust(21) + "  block 1  block 2  block 3  block 4   output", flush=True)
            for width in widths:
                more = {"base_width": widths[0]} if Class is Config else {}
                model = Class(block=block, width=width, heads=width // 32, depth=4, **more).for_data(8, 1, 10)
                configs = [TrainConfig(seed=seed, learning_rate=learning_rate, model=model) for seed in range(seeds)]
                changes.append(np.mean([block_changes(config, dataset, steps) for config in configs], axis=0))
                print(f"width {width}".ljust(20) + "".join(f"{change:9.4f}" for change in changes[-1]), flush=True)
            slopes = np.polyfit(np.log(widths), np.log(changes), 1)[0]
            print("slope in log-log".ljust(20) + "".join(f"{slope:9.2f}" for slope in slopes), flush=True)
            curves[f"{block} {variant}"] = [(math.log2(width / widths[0]), math.log2(change[-2] / changes[0][-2]))
                                            for width, change in zip(widths, changes)]
    save_plot(path, curves, "doublings of the width", "doublings of the last block's change")
    print(path)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--widths", type=between(int, 32, 16384), nargs="+", default=[64, 128, 256],
                        help="multiples of 32, growing, the first being the base (default: 64 128 256)")
    parser.add_argument("--steps", type=between(int, 2, 10**6), default=20,
                        help="optimizer steps before looking (default: 20)")
    parser.add_argument("--seeds", type=between(int, 1, 10**6), default=8,
                        help="runs to average over; a slope from a single one may be off by 0.2 (default: 8)")
    parser.add_argument("--out", type=path_type, default=Path("out/mup.svg"),
                        help="where the plot goes (default: out/mup.svg)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if len(args.widths) < 2 or args.widths != sorted(set(args.widths)) or any(width % 32 for width in args.widths):
        raise UserError("--widths: must be two or more multiples of 32, growing")
    if args.out.suffix != ".svg" or args.out.is_dir():
        raise UserError(f"--out: {args.out} is not the name of a .svg file")
    args.out.parent.mkdir(parents=True, exist_ok=True)  # now rather than after all the work
    coordinate_check(args.widths, args.steps, args.seeds, args.out)


if __name__ == "__main__":
    run_main(main)
