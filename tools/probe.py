"""A linear probe: how much of the class each block of a network knows, by noise level.

    python -m tools.probe out/ddae

Noisy images without labels go through the network, each block's output is averaged over tokens or pixels, and a
logistic regression is fitted on these features. Why: generation needs a representation of the image, and this measures
it [DDAE++, Xiang et al. 2025, arXiv 2505.10999]; variants/ddae.py tries to improve it.
"""

import torch
import torch.nn.functional as F

from data import epoch_order, load_dataset, to_network
from plumbing.command import Parser, UserError, between, path_type, run_main
from plumbing.config import dataset_of
from plumbing.processes import choose_device
from sample import load_denoiser, newest_run


@torch.no_grad()
def block_features(denoiser, images, sigma):
    """The output of each block for noisy images without labels, averaged over tokens or pixels: a list of (N, D)."""
    features, generator = [[] for _ in denoiser.net.blocks], torch.Generator(images.device).manual_seed(0)
    hooks = [block.register_forward_hook(lambda block, inputs, x, kept=kept: kept.append(x.flatten(1, -2).mean(1)))
             for block, kept in zip(denoiser.net.blocks, features)]
    for part in images.split(256):
        denoiser(part + sigma * torch.randn(part.shape, generator=generator, device=part.device), sigma)
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept).float() for kept in features]


def probe(features, labels, held_out, classes):
    """Fit a logistic regression on features (N, D) and return its accuracy on the rows `held_out` (bool, N).
    The rows held out take no part in the fit. Why linear: it shows what the features say, not what a network could
    still compute from them."""
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
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", type=path_type, help="run directory (default: the newest under out/)")
    parser.add_argument("--ema", type=between(float, 0.001, 0.288), metavar="STD",
                        help="EMA width (default: the widest in training)")
    parser.add_argument("--sigma", type=between(float, 1e-6, 1e6), nargs="+", default=[0.05, 0.1, 0.2, 0.5, 1.0],
                        help="noise levels (default: 0.05 0.1 0.2 0.5 1)")
    parser.add_argument("--images", type=between(int, 10, 10**8), default=10000,
                        help="how many to take at most; a fifth is held out (default: 10000)")
    parser.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args()
    device, run = choose_device(args.device), args.run or newest_run()
    denoiser, facts = load_denoiser(run, device, args.ema)
    name = dataset_of(run)
    dataset = load_dataset(name)
    classes = len(dataset.facts["classes"])  # the run's facts have none, if it had none
    if classes < 2 or dataset.facts["latent"]:
        raise UserError(f"{name} has no labels to probe for, or holds latents")
    (images, labels), = dataset.feed([epoch_order(len(dataset), 0, 0)[:args.images]], device)
    held_out = torch.arange(len(images), device=device) % 5 == 0
    print(f"accuracy on {held_out.sum()} held-out images, of a linear probe fitted on {(~held_out).sum()}")
    print("sigma".ljust(8) + "".join(f"block {i + 1}".rjust(10) for i in range(len(denoiser.net.blocks))))
    for sigma in args.sigma:
        features = block_features(denoiser, to_network(images, facts), sigma)
        accuracies = [probe(x, labels, held_out, classes) for x in features]
        print(f"{sigma:<8g}" + "".join(f"{accuracy:10.1%}" for accuracy in accuracies), flush=True)


if __name__ == "__main__":
    run_main(main)
