"""The page of a run: what is in it is what the run holds, and no text can break out of it. No browser is needed."""

import base64
import html.parser
import io
import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import from_network, load_dataset, make_grid, to_network
from helpers import TINY, call, close, done, make_set
from plumbing.config import load_config
from sample import guided, load_denoiser, sample
from tools import report

CPU, NASTY = torch.device("cpu"), ["</script><script>alert(1)</script>", "<!--<script>", "DATA & \"'\u2028"]
QUICK = ["train.py", *TINY, "--model.depth=1", "--model.width=16", "--steps=4", "--snapshot_every=1", "--val_every=2"]


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += text


@pytest.fixture(scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STEPS": 3, "WIDTHS": (0.03, 0.09), "GUIDANCES": (0.0, 1.0),
                            "SIGMAS": np.array([0.01, 1.0])}.items():
            patch.setattr(report, name, value)
        patch.setattr(train, "VALIDATION_PAIRS", train.VALIDATION_BATCH)
        yield


@pytest.fixture(scope="module")
def page(tmp_path_factory, quick):
    """A run whose classes have hostile names, a line of whose log is not finite, and what its page holds."""
    folder = tmp_path_factory.mktemp("a<b>&\"c'")
    images = np.array(load_dataset("digits").images[:60])
    held_out = np.arange(60) >= 40
    dataset = make_set(folder / "set", images, np.arange(60) % 3, NASTY, held_out)
    done(*QUICK, dataset, "--sample_every=2", "--model.modulation=scale,gate", f"--out={folder / 'run'}")
    with open(folder / "run" / "log.jsonl", "a") as file:
        print(json.dumps({"step": 4, "changed": NASTY[0]}), json.dumps({"step": 4, "loss": math.nan}), sep="\n",
              file=file)
    assert done("tools.report", folder / "run").stdout == f"{folder / 'run' / 'report.html'}\n"
    text = (folder / "run" / "report.html").read_text(encoding="utf-8")
    return folder / "run", text, json.loads(Page(text).scripts[0])


def picture(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def gallery(data, word):
    found, = (each for each in data["galleries"] if word in each["title"])
    return found


def test_no_text_breaks_out_of_the_page_and_nothing_is_fetched(page):
    run, text, data = page
    parsed = Page(text)
    assert [tag for tag, _ in parsed.tags if tag == "script"] == ["script"] * 2 and text.count("</script") == 2
    assert all(name in dict(data["facts"])["dataset"] for name in NASTY) and data["title"] == str(run)
    assert ["changed at step 4", NASTY[0]] in data["facts"]
    assert "innerHTML" not in text and set(re.findall(r"https?://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert [values["href"] for _, values in parsed.tags if {"src", "href"} & values.keys()] == ["data:,"]
    policy, = (values["content"] for _, values in parsed.tags if values.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_curves_hold_the_values_of_the_log(page):
    run, _, data = page
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    charts = {name: curve for chart in data["charts"] for name, curve in chart["curves"].items()}
    for column in ("val_loss", "learning_rate", "gradient_norm", "token_rms_middle", "weight_rms"):
        assert charts[column] == [[line["step"], line[column]] for line in lines if column in line]
    assert [value for _, value in charts["loss"]][-1] is None and len(charts["loss"]) == 5  # not finite
    errors = [line["error_by_sigma"] for line in lines if "error_by_sigma" in line]
    assert [[y for _, y in charts[f"step {step}"]] for step in (2, 4)] == errors
    sigmas = torch.tensor([x for x, _ in charts["step 2"]])
    tenths = (torch.arange(1000) + 0.5) / 1000  # the median of each tenth of ln(sigma) ~ N(-0.4, 1)
    close(sigmas, (torch.special.ndtri(tenths) - 0.4).exp().view(10, 100).median(1).values, rtol=0.01, atol=0)


def test_each_slider_place_shows_its_own_picture(page):
    run, _, data = page
    for each in data["galleries"]:
        assert len(each["pictures"]) == math.prod(len(slider["values"]) for slider in each["sliders"])
    grids = gallery(data, "training")
    assert grids["sliders"][0]["values"] == ["2", "4"]
    for step, url in zip((2, 4), grids["pictures"]):
        assert (picture(url) == np.asarray(Image.open(run / "samples" / f"{step:07d}.png"))).all()
    seeds = gallery(data, "same seeds")
    widths, guidances = ([float(value) for value in slider["values"]] for slider in seeds["sliders"])
    assert widths == [0.05, 0.09, 0.1] and guidances == [0, 1]
    assert seeds["sliders"][1]["start"] == 1 and grids["sliders"][0]["start"] == 1  # no guidance, the last step
    labels = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    for std, guidance in ((0.05, 0.0), (0.09, 1.0), (0.1, 1.0)):
        denoiser, facts = load_denoiser(run, CPU, std)
        expected = sample(denoiser, facts, labels, range(12), denoise=guided(denoiser, guidance), steps=3)
        place = widths.index(std) * len(guidances) + guidances.index(guidance)
        assert (picture(seeds["pictures"][place]) == np.asarray(make_grid(expected, 4, NASTY))).all()


def test_the_noise_slider_shows_noisy_denoised_and_clean(page):
    run, _, data = page
    denoiser, facts = load_denoiser(run, CPU)
    held_out = load_dataset(load_config(train.TrainConfig, [f"--config={run / 'config.toml'}"]).dataset).holdout
    firsts = [held_out.labels.tolist().index(label) for label in range(3)]
    clean = torch.from_numpy(held_out.images[firsts])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for sigma, url in zip((0.01, 1.0), gallery(data, "noise level")["pictures"]):
        x = to_network(clean, facts) + sigma * noise
        seen = from_network(x / math.sqrt(1 + 4 * sigma**2), facts)  # at standard deviation 0.5 again
        with torch.no_grad():
            rows = torch.cat([seen, from_network(denoiser(x, sigma, torch.arange(3)), facts), clean])
        difference = picture(url).astype(int) - np.asarray(make_grid(rows, 3, ("seen", "denoised", "clean")))
        assert np.abs(difference).max() <= 1  # a pixel may round to the other side


def test_the_command_of_a_run_trains_it_again(page):
    run, _, data = page
    program, script, *words = shlex.split(" ".join(data["command"]))
    config = load_config(train.TrainConfig, words)
    config.model = config.model.for_data(8, 1, 3)
    assert (program, script) == ("python", "train.py") and "--model.modulation=scale,gate" in words
    assert config == load_config(train.TrainConfig, [f"--config={run / 'config.toml'}"]) and "--seed=0" not in words


@pytest.mark.parametrize("kind", ["unconditional", "latents"])
def test_what_a_run_does_not_have_its_page_leaves_out(tmp_path, quick, monkeypatch, kind):
    monkeypatch.setattr(train, "save_samples", lambda *run: None)
    shape, kept = ((8, 8, 8), np.float32) if kind == "latents" else ((1, 8, 8), np.uint8)
    values = np.random.default_rng(0).integers(1, 255, (20, *shape)).astype(kept)
    words = [*QUICK, make_set(tmp_path / "set", values, np.arange(20) % 2, ["a", "b"]), f"--out={tmp_path / 'run'}"]
    done(*words, *["--model.num_classes=0"] * (kind == "unconditional"))
    done("tools.report", tmp_path / "run")
    data = json.loads(Page((tmp_path / "run" / "report.html").read_text()).scripts[0])
    assert len(data["galleries"]) == (0 if kind == "latents" else 2) and len(data["charts"]) >= 4
    if kind == "unconditional":
        seeds = gallery(data, "same seeds")
        assert seeds["sliders"][1]["values"] == ["1"] and picture(seeds["pictures"][0]).size
        assert "--model.num_classes=0" in data["command"]


def test_widths_that_snapshots_cannot_express_are_left_out(tmp_path):
    for step, std in ((10, "0.050"), (10, "0.100")):
        (tmp_path / "ema").mkdir(exist_ok=True)
        (tmp_path / "ema" / f"{step:07d}-{std}.pt").touch()
    assert report.expressible_widths(tmp_path) == [0.05, 0.1]


@pytest.mark.parametrize("said", ["config.toml", "log.jsonl", "there is no snapshot"])
def test_a_folder_that_is_no_run_is_one_line(page, tmp_path, said):
    if said != "config.toml":
        (tmp_path / "config.toml").write_text("steps = 4\n")
    if said.startswith("there"):
        (tmp_path / "log.jsonl").write_text('{"step": 0, "commit": ""}\n')
    result = call("tools.report", tmp_path)
    assert result.returncode == 2 and re.fullmatch(r"tools.report: .*\n", result.stderr) and said in result.stderr
