"""Draw the pictures of the lessons with the real code: `python -m lessons.figures rotation`, or `all`. Each lesson
takes less than a minute of one core, and prints the numbers that its page quotes.

Where a lesson needs a trained network, it is pretrained/digits.pt."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import batch_indices, from_network, load_dataset, make_grid, to_network
from ema import inner_products, solve_coefficients, std_to_gamma
from layers import MPMLP, Modulation, MPLinear, force_weight_normalization, mp_sum
from model import Denoiser, DiT, DiTConfig, MPBlock, MPInput, MPOutput, edm2_loss, weighted_error
from plumbing.command import Parser, path_type, run_main
from plumbing.files import atomic_file, save_picture
from sample import guided, heun_sampler, heun_steps, load_denoiser, noise_levels
from tools.plots import COLOURS, save_plot

CPU = torch.device("cpu")
SNAPSHOT = Path(__file__).parent.parent / "pretrained" / "digits.pt"


def save_panels(path, panels):
    """Write square panels side by side as an SVG, {title: [(kind, colour, points (N, 2)), ...]}, all in one scale.
    kind: "dots" or "line"."""
    size, top = 250, 34
    everything = torch.cat([points for parts in panels.values() for _, _, points in parts])
    reach = everything.abs().max().item() * 1.05
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(panels) * size} {size + top}" '
             'font-family="sans-serif" font-size="12">']
    for number, (title, parts) in enumerate(panels.items()):
        left, middle = number * size, size / 2
        lines.append(f'<text x="{left + middle}" y="20" text-anchor="middle" fill="#808080">{title}</text>')
        across = f"M{left + 8} {top + middle}H{left + size - 8}"
        down = f"M{left + middle} {top + 8}V{top + size - 8}"
        lines.append(f'<path d="{across}{down}" stroke="#80808060"/>')
        for kind, colour, points in parts:
            scale = (middle - 10) / reach
            places = [(left + middle + x * scale, top + middle - y * scale) for x, y in points.tolist()]
            if kind == "line":
                line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
                lines.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            else:
                lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
    with atomic_file(path) as file:
        file.write("\n".join([*lines, "</svg>"]).encode())


def batches(count, size=64, seed=0):
    """Yield `count` batches of digits as training sees them: images, labels, sigma, noise."""
    digits, generator = load_dataset("digits"), torch.Generator().manual_seed(seed)
    for step in range(count):
        indices = batch_indices(len(digits), seed, step * size, size)
        images = to_network(torch.from_numpy(digits.images[indices]), digits.facts)
        labels = torch.from_numpy(digits.labels[indices])
        sigma = (torch.randn(size, generator=generator) - 0.4).exp()
        yield images, labels, sigma, torch.randn(images.shape, generator=generator)


# ---- magnitudes ----

class AddingBlock(MPBlock):
    """An MPBlock whose residual sums only add."""

    def forward(self, x, cond):
        x = x + self.gate1(self.attention(self.modulation1(x, cond)), cond)
        x = x + self.gate2(self.mlp(self.modulation2(x, cond)), cond)
        return x


class ShrinkingMLP(MPMLP):
    """An MPMLP with SiLU as it is."""

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class ShrinkingBlock(MPBlock):
    """An MPBlock with SiLU as it is."""

    def __init__(self, config):
        super().__init__(config)
        self.mlp = ShrinkingMLP(config.width, 4 * config.width)


class FreeLinear(MPLinear):
    """An MPLinear whose rows may have any length; at first they have the same as in MPLinear."""

    def unit_rows(self):
        return self.weight / math.sqrt(self.weight.shape[1])


class FreeBlock(MPBlock):
    """An MPBlock of such linears."""

    def __init__(self, config):
        super().__init__(config)
        for part in self.modules():
            if type(part) is MPLinear:
                part.__class__ = FreeLinear


def token_rms(denoiser, batch):
    """[(block, mean RMS of its output tokens), ...], from 1."""
    images, labels, sigma, noise = batch
    seen = []
    hooks = [block.register_forward_hook(lambda block, inputs, tokens: seen.append(tokens.square().mean(-1).sqrt()))
             for block in denoiser.net.blocks]
    with torch.no_grad():
        denoiser(images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
    for hook in hooks:
        hook.remove()
    return [(number, rms.mean().item()) for number, rms in enumerate(seen, 1)]


def train_briefly(denoiser, rate, steps, force=True, watch=lambda denoiser: None):
    """Train with Adam at a constant rate, after a warm-up of 20 steps. watch: called after each step."""
    optimizer = torch.optim.Adam(denoiser.parameters(), betas=(0.9, 0.99))
    for step, (images, labels, sigma, noise) in enumerate(batches(steps)):
        loss = edm2_loss(denoiser, denoiser.uncertainty(sigma), images, labels, sigma, noise)
        optimizer.zero_grad()
        (loss * images[0].numel()).backward()
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 20, 1)
        optimizer.step()
        if force:
            force_weight_normalization(denoiser)
        watch(denoiser)


def magnitudes(out, steps=60):
    """Token RMS block by block, at initialisation and after some steps: plain, mp, and mp without one ingredient."""
    config = DiTConfig(depth=8, width=32, heads=2).for_data(8, 1, 10)
    plain_config = DiTConfig(block="plain", depth=8, width=32, heads=2).for_data(8, 1, 10)
    blocks = {"plain": None, "mp": MPBlock, "mp, without mp_sum": AddingBlock, "mp, SiLU as it is": ShrinkingBlock,
              "mp, rows free": FreeBlock}
    first, last = {}, {}
    for name, Block in blocks.items():
        torch.manual_seed(0)
        plain = Block is None
        denoiser = Denoiser(plain_config if plain else config)
        if not plain:
            denoiser.net = DiT(config, (MPInput, Block, MPOutput))
        batch = next(batches(1, size=256, seed=1))
        first[name] = token_rms(denoiser, batch)
        train_briefly(denoiser, 0.002 if plain else 0.03, steps, force=Block is not FreeBlock)
        last[name] = token_rms(denoiser, batch)
        before, after = first[name][-1][1], last[name][-1][1]
        print(f"{name:20} after block 8: {before:8.2f} at first, {after:8.2f} after {steps} steps")
    save_plot(out / "magnitudes-first.svg", first, "block", "token RMS at initialisation")
    save_plot(out / "magnitudes-trained.svg", last, "block", f"token RMS after {steps} steps")
    a, b = torch.randn(2, 1000, 512)
    for name, other in (("another tensor", b), ("itself", a), ("its negative", -a)):
        print(f"mp_sum of a tensor and {name}: RMS {mp_sum(a, other, t=0.5).square().mean().sqrt():.3f}")


# ---- forced weights ----

def weights(out, steps=300):
    """A row of two weights over 40 steps; row lengths and angles of a real network over more."""
    paths = {}
    for force in (False, True):
        torch.manual_seed(2)
        layer, path = MPLinear(2, 1), []
        for _ in range(40):
            path.append(layer.weight[0].detach().clone())
            row = layer.weight[0].detach()
            across = torch.stack([-row[1], row[0]])  # an input that the row does not see: its gradient is the largest
            layer.weight.grad = None
            layer(across).sum().backward()
            gradient = layer.weight.grad
            with torch.no_grad():
                layer.weight += 0.35 * gradient / gradient.norm()  # steps of one length, as Adam's nearly are
            if force:
                force_weight_normalization(layer)
        paths["forced back after each step" if force else "left as it is"] = torch.stack(path)
    save_panels(out / "row.svg", {name: [("line", COLOURS[0], path), ("dots", COLOURS[0], path)]
                                  for name, path in paths.items()})

    lengths, angles = {}, {}
    for force in (True, False):
        torch.manual_seed(0)
        denoiser = Denoiser(DiTConfig(depth=2, width=32, heads=2).for_data(8, 1, 10))
        matrix, rows, seen = denoiser.net.blocks[0].mlp.up.weight, [], []

        def watch(denoiser):
            rows.append(matrix.detach().clone())

        train_briefly(denoiser, 0.1, steps, force, watch)
        for before, after in zip(rows, rows[1:]):
            cosine = F.cosine_similarity(before.double(), after.double(), dim=1).clamp(max=1)
            seen.append(math.degrees(cosine.acos().mean()))
        name = "forced" if force else "not forced"
        lengths[name] = [(step, row.square().mean(1).sqrt().mean().item()) for step, row in enumerate(rows, 1)]
        means = np.convolve(seen, np.ones(10) / 10, mode="valid")  # over ten steps
        angles[name] = list(enumerate(means, 11))
        print(f"{name:10}: row RMS {lengths[name][-1][1]:.2f} after {steps} steps, "
              f"a step turns a row by {angles[name][20][1]:.2f}° at step 30 and {angles[name][-1][1]:.2f}° at the end")
        if not force:
            cosines = [F.cosine_similarity(b - a, a, dim=1).mean().item() for a, b in zip(rows, rows[1:])]
            print(f"cosine between Adam's step and the row: {np.mean(cosines):.3f} in the mean, "
                  f"so the angle between them is {math.degrees(math.acos(np.mean(cosines))):.0f}°")
    save_plot(out / "weights-length.svg", lengths, "step", "RMS of a row")
    save_plot(out / "weights-angle.svg", angles, "step", "degrees that a step turns a row by")


# ---- rotation ----

@torch.no_grad()
def rotation(out):
    """A cloud of tokens turned, scaled and shifted; the angles that a trained network uses."""
    torch.manual_seed(0)
    cloud = torch.randn(1, 60, 2) * torch.tensor([1.2, 0.5])
    panels, cond = {}, torch.ones(1, 2)
    for kind, gain in (("rotate", 0.9), ("scale", 0.6), ("shift", 1.0)):
        part = Modulation(2, {kind})
        part.gain.data.fill_(gain / part.linear(cond).abs().max().item())
        after = part(cloud, cond)
        lengths = after.norm(dim=-1) / cloud.norm(dim=-1)
        title = f"{kind}: lengths × {lengths.min():.2f} to {lengths.max():.2f}"
        panels[title] = [("dots", "#80808080", cloud[0]), ("dots", COLOURS[len(panels)], after[0])]
    save_panels(out / "rotation.svg", panels)

    denoiser, facts = load_denoiser(SNAPSHOT, CPU)
    curves, labels = {}, torch.arange(len(facts["classes"]))
    for number, block in enumerate(denoiser.net.blocks, 1):
        for branch, part in (("attention", block.modulation1), ("MLP", block.modulation2)):
            place = list(part.sizes).index("rotate")
            points = []
            for c_noise in np.linspace(math.log(0.02) / 4, math.log(20) / 4, 30):
                cond = denoiser.net.input(torch.zeros(len(labels), denoiser.net.config.tokens, 4),
                                          torch.full((len(labels),), c_noise), labels)[1]
                theta = part.linear(cond).split(list(part.sizes.values()), dim=-1)[place] * part.gain[place]
                points.append((4 * c_noise / math.log(10), theta.square().mean().sqrt().item()))
            curves[f"{branch} {number}"] = points
            print(f"block {number}: RMS angle before the {branch} {max(y for _, y in points):.2f} at most")
    save_plot(out / "rotation-learned.svg", curves, "log10 of sigma", "RMS angle before a branch, in radians")


# ---- noise levels ----

def ideal(images, labels):
    """The denoiser that has learned these training images by heart: the mean of all images of the label, each weighted
    by how likely x is that image with noise (the exact minimum of the training loss)."""
    def denoise(x, sigma, wanted):
        distances = (x[:, None] - images[None]).square().sum((2, 3, 4))  # (B, N)
        logits = -distances / (2 * sigma[:, None] ** 2)
        logits = logits.masked_fill(wanted[:, None] != labels, -math.inf)
        return torch.einsum("bn,nchw->bchw", logits.softmax(1), images)

    return denoise


@torch.no_grad()
def noise(out, count=400):
    """A digit at four noise levels; where training looks; the preconditioning; errors, the ideal denoiser's beside."""
    digits = load_dataset("digits")
    denoiser, facts = load_denoiser(SNAPSHOT, CPU)
    training, held_out = ((to_network(torch.tensor(part.images), facts), torch.tensor(part.labels))
                          for part in (digits, digits.holdout))
    torch.manual_seed(0)
    rows, labels = [], torch.arange(10)
    clean = torch.stack([held_out[0][held_out[1] == label][0] for label in labels])
    for sigma in (0.1, 0.5, 2.0, 10.0):
        noisy = clean + sigma * torch.randn(10, 1, 8, 8)
        seen = noisy * (0.5 / math.hypot(sigma, 0.5))  # to the data's own range, as the network sees it
        rows += [seen, denoiser(noisy, torch.tensor(sigma), labels)]
    names = [text for sigma in ("0.1", "0.5", "2", "10") for text in (f"sigma {sigma}", "denoised")]
    save_picture(make_grid(from_network(torch.cat(rows), facts), 10, names), out / "noise-levels.png")

    ln_sigma = torch.linspace(-5, 4, 91)
    curves = {f"p_mean {mean}": [(x.item(), round(math.exp(-(x - mean) ** 2 / 2) / math.sqrt(2 * math.pi), 3))
                                 for x in ln_sigma] for mean in (-0.4, 0.8)}
    save_plot(out / "noise-density.svg", curves, "ln sigma", "how often training draws it (p_std = 1)")
    sigma, data = ln_sigma.exp(), denoiser.sigma_data
    norm = (sigma**2 + data**2).sqrt()
    factors = {"c_skip": (data / norm) ** 2, "c_out": sigma * data / norm, "c_in": 1 / norm}
    save_plot(out / "noise-factors.svg", {name: list(zip(ln_sigma.tolist(), values.tolist()))
                                          for name, values in factors.items()}, "ln sigma", "factor")

    by_heart, errors = ideal(*training), {}
    for x in torch.linspace(-4, 3, 15):
        for name, model, (images, labels) in (
                ("network, held out", denoiser, held_out), ("network, trained on", denoiser, training),
                ("ideal, held out", by_heart, held_out), ("ideal, trained on", by_heart, training)):
            images, labels = images[:count], labels[:count]
            levels = torch.full((len(images),), x.exp().item())
            found = [weighted_error(model, images, labels, levels, torch.randn_like(images)).mean() for _ in range(3)]
            errors.setdefault(name, []).append((x.item(), np.mean(found)))
        errors.setdefault("exp(u(sigma))", []).append((x.item(), denoiser.uncertainty(levels[:1]).exp().item()))
    for name, points in errors.items():
        print(f"{name:20}" + "".join(f"  {y:.3f} at ln sigma {x:g}" for x, y in points[4:13:4]))
    shown = {name: [(x, min(y, 1.5)) for x, y in points] for name, points in errors.items()}
    save_plot(out / "noise-errors.svg", shown, "ln sigma", "weighted error (cut at 1.5)")


# ---- sampling ----

def euler_steps(denoise, noise, labels, steps):
    """As heun_steps, by Euler's method, the first half of each of its steps. Costs `steps` calls of `denoise`."""
    sigmas = noise_levels(steps=steps)
    x = noise * sigmas[0]
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        x = x + (sigma_next - sigma) * (x - denoise(x, sigma, labels)) / sigma
    return x


@torch.no_grad()
def sampling(out, most=63):
    """Two pixels on their way from noise to image, without and with guidance; errors of Euler and Heun."""
    denoiser, _ = load_denoiser(SNAPSHOT, CPU)
    torch.manual_seed(0)
    start, labels, panels = torch.randn(12, 1, 8, 8), torch.full((12,), 3), {}
    for guidance in (1, 3):
        path = []
        for x, sigma in heun_steps(guided(denoiser, guidance), start, labels, steps=32):
            seen = x * (0.5 / math.hypot(sigma, 0.5))
            path.append(torch.stack([seen[:, 0, 3, 2], seen[:, 0, 3, 5]], dim=1))
        path = torch.stack(path, dim=1)  # (12, 33, 2)
        spread = path[:, -1].std(0).mean()
        print(f"guidance {guidance}: standard deviation of the two pixels at the end {spread:.3f}")
        lines = [("line", "#80808080", way) for way in path]
        panels[f"guidance {guidance}"] = [*lines, ("dots", "#808080", path[:, 0]), ("dots", COLOURS[0], path[:, -1])]
    save_panels(out / "sampling-paths.svg", panels)

    start, labels = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    exact, errors = heun_sampler(denoiser, start, labels, steps=2 * most), {"Euler": [], "Heun": []}
    for calls in filter(lambda calls: calls <= most, (5, 9, 17, 35, 63)):
        for name, x in (("Euler", euler_steps(denoiser, start, labels, calls)),
                        ("Heun", heun_sampler(denoiser, start, labels, steps=(calls + 1) // 2))):
            errors[name].append((math.log2(calls), (x - exact).square().mean().sqrt().item()))
    for name, points in errors.items():
        print(f"{name}: " + ", ".join(f"{error:.4f} with {2**calls:.0f} calls" for calls, error in points))
    names = {math.log2(calls): str(calls) for calls in (5, 9, 17, 35, 63)}
    save_plot(out / "sampling-error.svg", errors, "calls of the network", "RMS error of the images", names)


# ---- averages ----

def averages(out):
    """Profiles of three widths; a width mixed from snapshots of two others; its error against their number."""
    t = np.linspace(0, 1, 101)
    profiles = {f"width {std}": [(x, (std_to_gamma(std) + 1) * x ** std_to_gamma(std)) for x in t]
                for std in (0.05, 0.10, 0.20)}
    save_plot(out / "averages-profiles.svg", profiles, "share of the training", "weight of a step")

    def profile(step, std):
        gamma = std_to_gamma(std)
        return np.where(t <= step, (gamma + 1) / step * (np.minimum(t, step) / step) ** gamma, 0)

    sources = [(step, std) for step in (0.5, 1.0) for std in (0.05, 0.10)]
    coefficients, residuals = solve_coefficients(sources, [(1.0, 0.15)])
    mixed = sum(c * profile(*source) for c, source in zip(coefficients[:, 0], sources))
    curves = {"wanted, 0.15": list(zip(t, profile(1.0, 0.15))), "mixed of four": list(zip(t, mixed)),
              "0.05 at the end": list(zip(t, profile(1.0, 0.05)))}
    save_plot(out / "averages-mixed.svg", curves, "share of the training", "weight of a step")
    print("four snapshots: " + ", ".join(f"{c:+.2f} × width {std} at {step:.0%}"
                                         for c, (step, std) in zip(coefficients[:, 0], sources))
          + f"; residual {residuals[0]:.1%}")

    counts, widths = (1, 2, 3, 5, 8, 12, 20, 30, 50), (0.03, 0.075, 0.15, 0.20)
    errors = {f"width {std}": [] for std in widths}
    for count in counts:
        sources = [((i + 1) / count, std) for i in range(count) for std in (0.05, 0.10)]
        _, residuals = solve_coefficients(sources, [(1.0, std) for std in widths])
        for name, residual in zip(errors, residuals):
            errors[name].append((count, max(residual, 1e-4)))
    for name, points in errors.items():
        print(f"{name}: " + ", ".join(f"{residual:.2%} with {count}" for count, residual in points[::2]))
    across = "snapshots of each of the widths 0.05 and 0.10"
    save_plot(out / "averages-error.svg", errors, across, "distance to the profile")
    away, = inner_products([(0.9, 0.05)], [(1.0, 0.05)])[0] / inner_products([(1.0, 0.05)], [(1.0, 0.05)])[0]
    print(f"overlap of the profile of 0.05 at 90% with that at the end: {away:.2f}")


LESSONS = {"magnitudes": magnitudes, "weights": weights, "rotation": rotation, "noise": noise, "sampling": sampling,
           "averages": averages}


def main():
    parser = Parser(__doc__)
    parser.add_argument("name", choices=[*LESSONS, "all"], help="which lesson")
    parser.add_argument("--out", type=path_type, default=Path("out/lessons"),
                        help="directory of the pictures (default: out/lessons)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, draw in LESSONS.items():
        if args.name in (name, "all"):
            draw(args.out)
    print(args.out)


if __name__ == "__main__":
    run_main(main)
