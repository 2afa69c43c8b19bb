"""Long skips, as in U-ViT, and ScaleLong's ways to scale them.

    python train.py --config=configs/scalelong.toml --model.skip_scaling=learned
    python -m variants.scalelong RUN ...         # how much block outputs and gradients of finished runs varied over training

Block i of the first half also feeds block depth-1-i of the second half: x = Linear(cat[x, s·skip]). Take an odd depth: with an
even one, the innermost skip joins neighbours. The factor s is

    none        1, U-ViT's own
    sqrt        1/sqrt(2)
    constant    kappa^i, i = 0 for the outermost skip, the first block's
    learned     one factor per token, sigmoid of a small network on the tokens' means over channels, shared by all skips or not

In the magnitude-preserving network x and skip enter in the same ratio 1 : s by mp_cat with t = s/(1+s), followed by an
MPLinear: whatever s, the magnitude stays 1, where the paper's own version lets it follow s. What is joined, and what the
blocks of the first half pass on, is normalised, as EDM2 does in its encoder, so that deviations do not add up over joins.

Sources: [U-ViT] Bao et al. 2023, arXiv 2209.12152; [ScaleLong] Huang et al. 2023, arXiv 2310.13545.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from layers import MPLinear, mp_cat, normalize
from model import DiT, DiTConfig, key

SCALINGS = ("none", "sqrt", "constant", "learned")


@dataclass
class Config(DiTConfig):
    skip_scaling: str = key("constant", "factor on the long skips: none, sqrt, constant or learned")
    kappa: float = key(0.7, "with constant: from each skip to the next inner one")
    skip_shared: bool = key(True, "with learned: one network for all skips, instead of one each")

    def __post_init__(self):
        super().__post_init__()
        if self.skip_scaling not in SCALINGS:
            raise ValueError(f"skip_scaling: {self.skip_scaling!r} is not one of {', '.join(SCALINGS)}")
        if not 0 < self.kappa <= 1:
            raise ValueError(f"kappa: {self.kappa} is not in (0, 1]")
        if self.depth < 2:
            raise ValueError(f"depth: {self.depth} is too little for a skip")

    def network(self):
        return LongSkipDiT(self)


class LearnedScale(nn.Module):
    """One factor per token, (B, T, D) -> (B, T, 1), between 0 and 1 [ScaleLong, LS]. Hidden units: T/16, here 8 at least, as
    a single one with its ReLU is soon dead."""

    def __init__(self, tokens):
        super().__init__()
        hidden = max(tokens // 16, 8)
        self.net = nn.Sequential(nn.Linear(tokens, hidden), nn.ReLU(), nn.Linear(hidden, tokens), nn.Sigmoid())

    def forward(self, x):
        return self.net(x.mean(-1))[..., None]


class LongSkipDiT(DiT):
    """The network of model.py with long skips across its middle."""

    def __init__(self, config):
        super().__init__(config)
        D, skips = config.width, config.depth // 2
        self.joins = nn.ModuleList(MPLinear(2 * D, D) if config.block == "mp" else nn.Linear(2 * D, D) for _ in range(skips))
        if config.block == "plain":
            for join in self.joins:
                nn.init.xavier_uniform_(join.weight)
                nn.init.zeros_(join.bias)
        if config.skip_scaling == "learned":
            tokens = (config.image_size // config.patch) ** 2
            self.scales = nn.ModuleList(LearnedScale(tokens) for _ in range(1 if config.skip_shared else skips))

    @property
    def rates(self):
        """The networks of learned factors are plain ones, for which a magnitude-preserving network's rate is too high: a tenth of it."""
        learned = self.config.block == "mp" and self.config.skip_scaling == "learned"
        return dict.fromkeys(self.scales.parameters(), 0.1) if learned else {}

    def scale(self, i, skip):
        """The factor on skip i, a number or (B, T, 1)."""
        if self.config.skip_scaling == "learned":
            return self.scales[i % len(self.scales)](skip)
        return {"none": 1.0, "sqrt": 0.5**0.5, "constant": self.config.kappa**i}[self.config.skip_scaling]

    def join(self, i, x, skip):
        s = self.scale(i, skip)
        both = mp_cat(normalize(x), skip, s / (1 + s)) if self.config.block == "mp" else torch.cat([x, s * skip], dim=-1)
        return self.joins[i](both).to(x.dtype)

    def middle(self, x, cond):
        skips = []
        for i, block in enumerate(self.blocks):
            partner = len(self.blocks) - 1 - i
            if partner < i:                                                 # in the second half
                x = self.join(partner, x, skips[partner])
            x = block(x, cond)
            if i < len(self.joins):                                         # in the first half
                x = normalize(x) if self.config.block == "mp" else x
                skips.append(x)
        return x


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories; train them with a small log_every")
    parser.add_argument("--after", type=int, default=50, help="leave out the first steps (default: 50)")
    args = parser.parse_args()
    names = {"token_rms_first": "first", "token_rms_middle": "middle", "token_rms_last": "last", "gradient_norm": "gradient"}
    rows = []
    for run in args.runs:
        try:
            lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            values = np.array([[line[name] for name in names] for line in lines if "loss" in line and line["step"] > args.after], dtype=float)
        except (OSError, ValueError, KeyError, TypeError):
            parser.error(f"{run}: has no log.jsonl of a training")
        if len(values) < 3:
            parser.error(f"{run}: its log has {len(values)} lines after step {args.after}, too few")
        if not np.isfinite(values).all():
            parser.error(f"{run}: its log has values that are not finite")
        spread = zip(values.std(0), np.diff(values, axis=0).std(0))
        rows.append(f"{run.name:24}" + "".join(f"{over:10.4f} ({change:.4f})" for over, change in spread))
    print("Token RMS after three blocks and norm of the gradient: standard deviation over training (and of the change from line to line)")
    print(" " * 24 + "".join(f"{short:>19}" for short in names.values()), *rows, sep="\n")


if __name__ == "__main__":
    main()
