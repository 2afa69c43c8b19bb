"""The whole method on one screen: `python -m lessons.tiny` trains on the digits and draws tiny.png in under a minute.

train.py adds several GPUs, micro-batches, resuming, a log, validation and snapshots; sample.py adds guidance."""

import torch

from data import batch_indices, from_network, load_dataset, make_grid, to_network
from ema import PowerEMA
from layers import force_weight_normalization
from model import Denoiser, DiTConfig, edm2_loss
from sample import heun_sampler


def training_step(denoiser, optimizer, rate, images, labels, sigma, noise):
    loss = edm2_loss(denoiser, denoiser.uncertainty(sigma), images, labels, sigma, noise)
    optimizer.zero_grad()
    (loss * images[0].numel()).backward()  # a sum over channels and pixels
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    force_weight_normalization(denoiser)  # rows back to RMS 1: only directions change
    return loss.item()


if __name__ == "__main__":
    torch.set_num_threads(1)  # for so small a network more gain nothing, and cost much on busy cores
    torch.manual_seed(0)
    digits = load_dataset("digits")
    denoiser = Denoiser(DiTConfig(depth=4, width=96, heads=3).for_data(image_size=8, channels=1, num_classes=10))
    optimizer = torch.optim.Adam(denoiser.parameters(), betas=(0.9, 0.99))
    ema = PowerEMA(denoiser, stds=[0.10])
    for step in range(500):
        indices = batch_indices(len(digits), seed=0, start=step * 64, count=64)
        images = to_network(torch.from_numpy(digits.images[indices]), digits.facts)  # standard deviation 0.5
        labels = torch.from_numpy(digits.labels[indices])
        labels[torch.rand(64) < 0.1] = 10  # the null label
        sigma = (torch.randn(64) * 1.0 - 0.4).exp()
        rate = 0.03 * min((step + 1) / 50, 1) / max(step / 200, 1) ** 0.5
        loss = training_step(denoiser, optimizer, rate, images, labels, sigma, torch.randn_like(images))
        ema.update(denoiser, step + 1)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/500  loss {loss:.3f}", flush=True)
    noise, labels = torch.randn(100, 1, 8, 8), torch.arange(10).repeat_interleave(10)
    images = from_network(heun_sampler(ema.averages[0.10], noise, labels), digits.facts)
    make_grid(images, columns=10, names=digits.facts["classes"]).save("tiny.png")
