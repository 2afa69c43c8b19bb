"""Long skips, as in U-ViT, and ScaleLong's ways to scale them.

    python train.py --config=configs/scalelong.toml --model.skip_scaling=learned
    python -m variants.scalelong RUN ...         # how much block outputs and gradients varied over the training of runs

Block i of the first half also feeds block depth-1-i of the second half: x = Linear(cat[x, s·skip]). Choose an odd
depth: with an even one, the innermost skip joins two neighbours. The factor s is

    none        1, as in U-ViT
    sqrt        1/sqrt(2)
    constant    kappa^i, where i = 0 is the outermost skip, which comes from the first block
    learned     one factor per token: the sigmoid of a small network, whose input is the mean of each token's channels

The magnitude-preserving network joins x and skip in the same ratio 1 : s by mp_cat with t = s/(1+s), followed by an
MPLinear. So the magnitude stays 1 for every s; in the paper's version it depends on s. Both inputs of a join are
normalised, and so is the output of each block of the first half, as EDM2 does in its encoder. Otherwise small
deviations from RMS 1 would add up from join to join.

Sources: [U-ViT] Bao et al. 2023, arXiv 2209.12152; [ScaleLong] Huang et al. 2023, arXiv 2310.13545.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from layers import MPLinear, mp_cat, normalize
from model import DiT, DiTConfig, init_linears
from plumbing.command import Parser, between, path_type, reading, run_main
from plumbing.keys import key

SCALINGS = ("none", "sqrt", "constant", "learned")


@dataclass
class SkipKeys:
    """The keys of skip factors, apart so that every network with long skips can have them."""

    skip_scaling: str = key("none", "factor on the long skips: none, sqrt, constant or learned", choices=SCALINGS)
    kappa: float = key(0.7, "with constant: ratio of a skip's factor to that of the next outer one", 1e-6, 1)
    skip_shared: bool = key(True, "with learned: one network for all skips of a size, instead of one for each")


@dataclass
class Config(SkipKeys, DiTConfig):
    skip_scaling: str = key("constant", "factor on the long skips: none, sqrt, constant or learned", choices=SCALINGS)

    def __post_init__(self):
        super().__post_init__()
        if self.depth < 2:
            raise ValueError(f"depth: {self.depth} is too little for a skip")

    def network(self):
        return LongSkipDiT(self)


class LearnedScale(nn.Module):
    """One factor per token, between 0 and 1: (B, ..., D) -> (B, ..., 1), T tokens in all [ScaleLong, LS].

    There are T/16 hidden units, here 8 at least: a single unit with a ReLU is soon dead.
    """

    def __init__(self, tokens):
        super().__init__()
        hidden = max(tokens // 16, 8)
        self.net = nn.Sequential(nn.Linear(tokens, hidden), nn.ReLU(), nn.Linear(hidden, tokens), nn.Sigmoid())

    def forward(self, x):
        means = x.mean(-1, keepdim=True)  # (B, ..., 1)
        return self.net(means.flatten(1)).view(means.shape)


class SkipScales(nn.ModuleList):
    """The factor on each long skip: skip i (B, ..., D) -> a number or (B, ..., 1), where 0 is the outermost skip.

    tokens: how many each skip has, from the outermost inwards. Why a module: all variants with long skips share it.
    """

    def __init__(self, config, tokens):
        sizes = dict.fromkeys(tokens) if config.skip_shared else tokens
        super().__init__(LearnedScale(size) for size in sizes if config.skip_scaling == "learned")
        self.places = [list(sizes).index(size) if config.skip_shared else i for i, size in enumerate(tokens)]
        self.config = config

    @property
    def lr_scale(self):
        """A tenth for the networks of learned factors: they have plain layers, for which the rate of mp is too high."""
        return dict.fromkeys(self.parameters(), 0.1) if self.config.block == "mp" else {}

    def forward(self, i, skip):
        if self.config.skip_scaling == "learned":
            return self[self.places[i]](skip)
        return {"none": 1.0, "sqrt": 0.5**0.5, "constant": self.config.kappa**i}[self.config.skip_scaling]


class LongSkipDiT(DiT):
    """The network of model.py with long skips from its first half to its second.

    parts: as in DiT. extra_tokens: how many tokens there are beside the patches (learned factors need the number).
    """

    def __init__(self, config, parts=None, extra_tokens=0):
        super().__init__(config, parts)
        D, skips = config.width, config.depth // 2
        self.joins = nn.ModuleList(MPLinear(2 * D, D) if config.block == "mp" else nn.Linear(2 * D, D)
                                   for _ in range(skips))
        init_linears(self.joins)
        self.scales = SkipScales(config, [config.tokens + extra_tokens] * skips)

    @property
    def lr_scale(self):
        return super().lr_scale | self.scales.lr_scale

    def join(self, i, x, skip):
        """Tokens and skip i, each (B, T, D) -> tokens (B, T, D)."""
        s = self.scales(i, skip)
        if self.config.block == "mp":
            both = mp_cat(normalize(x), skip, s / (1 + s))  # (B, T, 2D)
        else:
            both = torch.cat([x, s * skip], dim=-1)
        return self.joins[i](both).to(x.dtype)

    def run_blocks(self, x, cond):
        skips = []
        for i, block in enumerate(self.blocks):
            partner = len(self.blocks) - 1 - i
            if partner < i:  # in the second half
                x = self.join(partner, x, skips[partner])
            x = block(x, cond)
            if i < len(self.joins):  # in the first half
                x = normalize(x) if self.config.block == "mp" else x
                skips.append(x)
        return x


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=path_type, help="run directories; train them with a small log_every")
    parser.add_argument("--after", type=between(int, 0, 10**9), default=50,
                        help="leave out the steps up to this one (default: 50)")
    args = parser.parse_args()
    names = {"token_rms_first": "first", "token_rms_middle": "middle", "token_rms_last": "last",
             "gradient_norm": "gradient"}
    rows = []
    for run in args.runs:
        with reading(run / "log.jsonl"):
            lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            lines = [line for line in lines if "loss" in line and line["step"] > args.after]
            values = np.array([[line[name] for name in names] for line in lines], dtype=float)
            if len(values) < 3 or not np.isfinite(values).all():
                raise ValueError(f"has {len(values)} lines after step {args.after}, too few, or values that are not "
                                 "finite")
        spread = zip(values.std(0), np.diff(values, axis=0).std(0))
        rows.append(f"{run.name:24}" + "".join(f"{over:10.4f} ({change:.4f})" for over, change in spread))
    print("Token RMS after three blocks and norm of the gradient: standard deviation over training (and of the change "
          "from line to line)")
    print(" " * 24 + "".join(f"{short:>19}" for short in names.values()), *rows, sep="\n")


if __name__ == "__main__":
    run_main(main)
