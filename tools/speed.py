"""What a training step costs on this machine, run by hand: `python -m tools.speed --threads 2`.

Milliseconds of forward, backward and optimizer, with the share that the matrix products alone would take; then images a
second of sampling and Inception. All modes take turns.
"""

import argparse
import sys
import time
from itertools import product
from statistics import median

import torch

sys.path.insert(0, "tests")  # where pytest finds the tests' helpers
from fid import fold_normalization, inception
from model import DiTConfig, edm2_loss
from plumbing.processes import choose_device
from sample import heun_sampler
from helpers import second_inception
from train import TrainConfig, build, optimizer_step

NETWORKS = {"digits": (64, {"depth": 4, "width": 96, "heads": 3, "patch": 2, "image_size": 8, "channels": 1}),
            "28x28": (64, {"depth": 8, "width": 256, "heads": 8, "patch": 4, "image_size": 28, "channels": 1}),
            "DiT-S/4": (32, {"size": "S", "patch": 4, "image_size": 32, "channels": 4})}
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
args, device = parser.parse_args(), choose_device()
torch.set_num_threads(args.threads)


def make_step(block, batch, options, compiled=False, dtype=torch.float32):
    """The denoiser, a function that takes one training step, and one that does only the matrix products of it."""
    config, side, pairs = DiTConfig(block=block, num_classes=10, **options), options["image_size"], []
    denoiser, ema, optimizer = build(TrainConfig(model=config), device, dtype == torch.bfloat16)
    if compiled:
        denoiser.net.compile()
    images, sigma = torch.randn(batch, options["channels"], side, side, device=device), torch.ones(batch, device=device)
    for name, p in denoiser.net.named_parameters():
        if p.ndim == 2 and "label" not in name:
            rows = batch if "modulation" in name or "noise" in name else batch * config.tokens
            pairs.append((torch.randn(rows, p.shape[1], dtype=dtype, device=device), p.detach().to(dtype)))

    def step():
        optimizer.zero_grad()
        edm2_loss(denoiser, denoiser.uncertainty(sigma), images, sigma.long(), sigma, images).backward()
        optimizer_step(denoiser, optimizer, 1e-3)
        ema.update(denoiser, ema.step + 1)

    return denoiser, step, lambda: [((y := x @ w.T) @ w, y.T @ x) for x, w in pairs]


def measure(functions, rounds):
    """Median and least milliseconds of each function, {name: (median, least)}, in turns, after a first call of each."""
    times = {name: [] for name in functions}
    for name, function in list(functions.items()) * (rounds + 1):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times[name].append(1000 * (time.perf_counter() - begin))
    return {name: (median(values[1:]), min(values[1:])) for name, values in times.items()}


for network, precision in product(args.networks, ("float32", "bfloat16")):
    steps = {}
    torch.compiler.reset()  # it compiles one code eight times at most
    for block, mode in product(("mp", "plain"), ("eager", "compiled")):
        _, step, products = make_step(block, *NETWORKS[network], mode == "compiled", getattr(torch, precision))
        steps |= {f"{block} {mode}": step, f"{block} products": products}
    times = measure(steps, 5)
    for name, (middle, least) in times.items():
        share = times[f"{name.split()[0]} products"][1] / least
        print(f"{network:8} {precision:9} {name:15} median {middle:7.1f} ms  least {least:7.1f}  ({share:.0%})")
denoiser, *_ = make_step("mp", *NETWORKS["DiT-S/4"])
_, weights = second_inception(torch.zeros(1, 3, 299, 299))  # random ones, in the layout of the file
weights = fold_normalization({name: weight.to(device) for name, weight in weights.items()})
functions = {"sampling, 18 steps": lambda: heun_sampler(denoiser, torch.randn(32, 4, 32, 32, device=device), steps=18),
             "Inception": lambda: inception(torch.zeros(32, 3, 32, 32, device=device), weights)}
for name, (_, least) in measure(functions, 1).items():
    print(f"{name}: {32000 / least:.1f} images/s")
