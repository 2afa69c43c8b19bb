"""A page to look into a run: `python -m tools.report out/digits` writes out/digits/report.html.

It is one file that any browser opens, without a network, a server or a library: the curves of the log, the sample grids
over training, the same seeds at several EMA widths and guidances, held-out images denoised at several noise levels, and
the facts and the command of the run. Latents are not decoded, so that of a run on latents it shows curves and facts.
tools/report.html is the page; the data take the place of its line DATA.
"""

import base64
import io
import json
import math
import shlex
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from PIL import Image

from data import describe, from_network, load_dataset, make_grid, to_network
from ema import solve_coefficients
from plumbing.command import Parser, path_type, reading, run_main, track
from plumbing.config import flatten, load_config
from plumbing.files import atomic_file
from plumbing.processes import choose_device
from plumbing.snapshots import list_snapshots
from sample import guided, load_denoiser, newest_run, sample
from train import TrainConfig

WIDTHS = (0.03, 0.15, 0.20)  # of averages, beside those that were tracked
GUIDANCES = (0.0, 1.0, 2.0, 4.0)
SIGMAS = np.geomspace(0.02, 20, 13)
STEPS = 12  # of the sampler: fewer than sample.py takes, since the page needs many grids
COLUMNS = 4  # of such a grid
CHARTS = [  # title, columns of the log, what to see
    ("Training loss", ["loss"],
     "The error divided by exp(u), plus u, the network's own estimate of ln(error): so it may fall below 0."),
    ("Error on held-out images", ["val_loss"],
     "On the same images and noise in every run. If it rises while the loss falls, images are learned by heart."),
    ("RMS of tokens and weights", ["token_rms_first", "token_rms_middle", "token_rms_last", "weight_rms"],
     "After the first, middle and last block. An mp network keeps them of the order of 1, its weights at 1."),
    ("Norm of the gradient", ["gradient_norm"], "Of one batch, so it jumps. What matters is a lasting rise."),
    ("Learning rate", ["learning_rate"], "While it falls, the errors usually fall faster.")]


def thin(items, most):
    """At most `most` of a list, evenly chosen, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)
    return [items[place] for place in places]


def read_lines(run):
    """The lines of a run's log, the first of which says with what it was made. Raises UserError."""
    with reading(run / "log.jsonl"):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        if "commit" not in lines[0]:
            raise ValueError("its first line does not say with what the run was made")
        return lines


def make_charts(lines):
    """The charts of a log: dicts of title, note, x, log_x and curves {name: [[x, y], ...]}; y is None where it is not
    finite."""
    charts = []
    for title, columns, note in CHARTS:
        curves = {}
        for column in columns:
            points = [(line["step"], line[column]) for line in lines if column in line]
            curves[column] = [[step, y if math.isfinite(y) else None] for step, y in thin(points, 500)]
        if any(curves.values()):
            charts.append({"title": title, "note": note, "x": "step", "log_x": False, "curves": curves})
    errors = [line for line in lines if "error_by_sigma" in line]
    if errors:
        # ln(sigma) of val_loss follows N(-0.4, 1), and each error is the mean over a tenth of it
        sigmas = [math.exp(NormalDist(-0.4, 1).inv_cdf((tenth + 0.5) / 10)) for tenth in range(10)]
        curves = {f"step {line['step']}": [[sigma, y if math.isfinite(y) else None]
                                           for sigma, y in zip(sigmas, line["error_by_sigma"])]
                  for line in thin(errors, 4)}
        note = "A point is a tenth of val_loss. Left: detail; right: layout. Where nothing is learned it is 1."
        charts.insert(0, {"title": "Held-out error by noise level", "note": note, "x": "sigma",
                          "log_x": True, "curves": curves})
    return charts


def as_url(picture):
    """A Pillow image as the text of a URL that holds it, made smaller if a page has no room for it."""
    picture.thumbnail((1200, 1200))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def slider(name, values, start):
    """A slider of the page: its name, the texts of its places, and the number of the place where it starts."""
    return {"name": name, "values": [f"{value:.3g}" for value in values], "start": start}


def over_training(run):
    """The sample grids of a run as pictures of the page, with a slider over the steps."""
    paths = thin(sorted((run / "samples").glob("*.png")), 20)
    pictures = []
    for path in paths:
        with reading(path):
            pictures.append(as_url(Image.open(path)))
    steps = {"name": "step", "values": [str(int(path.stem)) for path in paths], "start": len(paths) - 1}
    return {"title": "Samples during training", "wide": True, "sliders": [steps], "pictures": pictures,
            "note": "Drawn by the widest average of the weights, always from the same seeds. Each row is a class."}


def expressible_widths(run):
    """The EMA widths that the snapshots of a run hold or can be mixed to; see reconstruct() in ema.py."""
    sources = [(step, std) for step, std, _ in list_snapshots(run / "ema")]
    _, residuals = solve_coefficients(sources, [(sources[-1][0], std) for std in WIDTHS])
    mixed = [std for std, residual in zip(WIDTHS, residuals) if residual <= 0.03]
    return sorted({*mixed, *(std for _, std in sources)})


def by_width_and_guidance(run, device):
    """The same seeds at several EMA widths and guidances, as pictures of the page with a slider for each."""
    widths, guidances, pictures = expressible_widths(run), GUIDANCES, []
    for std in track(widths, "EMA widths", len(widths)):
        denoiser, facts = load_denoiser(run, device, std)
        config, classes = denoiser.net.config, facts["classes"][:10]
        if not (config.num_classes and config.label_dropout):  # it cannot guide itself
            guidances = (1.0,)
        labels = torch.arange(len(classes) or 1).repeat_interleave(COLUMNS if classes else 10 * COLUMNS)
        for guidance in guidances:
            denoise = guided(denoiser, guidance)
            images = sample(denoiser, facts, labels, range(len(labels)), denoise=denoise, steps=STEPS)
            pictures.append(as_url(make_grid(images, COLUMNS, classes)))
    sliders = [slider("EMA width", widths, len(widths) // 2), slider("guidance", guidances, guidances.index(1.0))]
    return {"title": "The same seeds at other settings", "sliders": sliders, "pictures": pictures,
            "note": "A wider average of the weights smooths over more steps of training. Guidance 0 ignores the class, "
                    f"1 is none, more makes images more typical and more alike. Drawn in {STEPS} steps."}


@torch.no_grad()
def by_noise_level(denoiser, facts, dataset):
    """Images with noise and what the network makes of them, as pictures of the page with a slider over sigma. The
    images are one of each of ten classes, or ten without classes; held-out ones, if there are any."""
    part, device = dataset.holdout or dataset, next(denoiser.parameters()).device
    firsts = [int(np.flatnonzero(part.labels == label)[0]) for label in np.unique(part.labels)[:10]]
    indices = np.array(firsts if len(firsts) > 1 else range(min(10, len(part))))
    images, labels = next(part.feed([indices], device))
    labels = labels if denoiser.net.config.num_classes else None
    clean = to_network(images, facts)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(device)
    pictures = []
    for sigma in SIGMAS:
        x = clean + sigma * noise
        answer = denoiser(x, sigma, labels)
        seen = x * (denoiser.sigma_data / math.hypot(sigma, denoiser.sigma_data))  # in the data's own range
        rows = [from_network(row, facts).cpu() for row in (seen, answer, clean)]
        pictures.append(as_url(make_grid(torch.cat(rows), len(indices), ("seen", "denoised", "clean"))))
    return {"title": "What the network sees and says, by noise level", "wide": True, "pictures": pictures,
            "sliders": [slider("sigma", SIGMAS, len(SIGMAS) // 2)],
            "note": "Sigma is the noise's standard deviation; that of the images is 0.5. Sampling begins at a large "
                    "sigma, where the answer is the mean of all that is possible, and ends where only detail is open."}


def command_of(config):
    """The words of the command that trains such a run: the keys that differ from their defaults, but for what the
    dataset says."""
    default, words = flatten(type(config)(model=type(config.model)())), ["python train.py"]
    for name, value in flatten(config).items():
        from_dataset = name in ("model.image_size", "model.channels") or name == "model.num_classes" and value
        if value != default[name] and not from_dataset:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(shlex.quote(f"--{name}={text.lower() if isinstance(value, bool) else text}"))
    return words


def list_facts(run, config, lines, denoiser, facts):
    """What the page says about a run, pairs of name and text."""
    last = {name: value for line in lines for name, value in line.items()}
    pairs = [("trained", f"{last['step']:,} of {config.steps:,} steps of {config.batch:,} images"),
             ("dataset", f"{config.dataset}: {describe(facts)}"),
             ("network", f"{config.variant or config.model.block}, "
                         f"{sum(p.numel() for p in denoiser.parameters()):,} parameters")]
    if "val_loss" in last:
        pairs.append(("val_loss", f"{last['val_loss']:.4f}"))
    pairs += [(name, str(lines[0][name])) for name in ("commit", "torch", "hardware", "precision")]
    pairs += [("started from", f"{line['init']}, SHA-256 {line['sha256']}") for line in lines if "init" in line]
    pairs += [(f"changed at step {line['step']}", line["changed"]) for line in lines if "changed" in line]
    return pairs


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", type=path_type, help="run directory (default: the newest under out/)")
    parser.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args()
    device, run = choose_device(args.device), args.run or newest_run()
    config = load_config(TrainConfig, [f"--config={run / 'config.toml'}"])
    lines = read_lines(run)
    denoiser, facts = load_denoiser(run, device)
    galleries = []
    if not facts["latent"]:
        if any((run / "samples").glob("*.png")):
            galleries.append(over_training(run))
        galleries.append(by_width_and_guidance(run, device))
        galleries.append(by_noise_level(denoiser, facts, load_dataset(config.dataset)))
    keys = [(name, json.dumps(value, ensure_ascii=False)) for name, value in flatten(config).items()]
    data = {"title": str(run), "charts": make_charts(lines), "galleries": galleries, "command": command_of(config),
            "facts": list_facts(run, config, lines, denoiser, facts), "keys": keys}
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # so that no name can end the page's script
    page = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    with atomic_file(run / "report.html") as file:
        file.write(page.replace("DATA", text).encode())
    print(run / "report.html")


if __name__ == "__main__":
    run_main(main)
