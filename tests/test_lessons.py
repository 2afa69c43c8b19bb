"""The lessons do what the real code does, and no page leads nowhere."""

import re

import torch

from data import load_dataset
from helpers import CPU, ROOT, close
from lessons import figures
from lessons.tiny import training_step
from model import DiTConfig
from train import TrainConfig, accumulate_gradients, build, draw_step, optimizer_step, prepare_batch


def test_the_step_on_one_screen_is_the_step_of_train():
    digits = load_dataset("digits")
    model = DiTConfig(depth=2, width=32, heads=2).for_data(8, 1, 10)
    config = TrainConfig(model=model, batch=16)
    images, labels = (torch.tensor(array[:16]) for array in (digits.images, digits.labels))

    ours, ema, optimizer = build(config, CPU)
    for step in range(3):
        draws = draw_step(config, digits, step, CPU)
        loss, _ = accumulate_gradients(config, digits.facts, ours, ours, None, iter([(images, labels)]), draws, step)
        optimizer_step(ours, optimizer, 0.02)

    theirs, _, _ = build(config, CPU)
    optimizer = torch.optim.Adam(theirs.parameters(), betas=(0.9, 0.99))
    for step in range(3):
        draws = draw_step(config, digits, step, CPU)
        batch = prepare_batch(config, digits.facts, images, labels, draws, slice(None))
        tiny_loss = training_step(theirs, optimizer, 0.02, *batch)

    close(loss.item(), tiny_loss, rtol=1e-5, atol=0)
    close(dict(theirs.named_parameters()), dict(ours.named_parameters()), rtol=1e-4, atol=1e-5)


def anchors(page):
    """What a link into a page may end with, as GitHub makes it of the headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_no_page_has_a_dead_link():
    pages = [page for page in ROOT.rglob("*.md") if not {"out", ".venv"} & set(page.relative_to(ROOT).parts)]
    assert len(pages) > 15
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if not path.startswith("http"):
                target = page.parent / path if path else page
                assert target.exists(), f"{page}: {link}"
                assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_the_readme_shows_the_step_that_the_lesson_takes():
    text = (ROOT / "README.md").read_text()
    step, = re.findall(r"```python\n(def training_step.*?)```", text, re.DOTALL)
    assert step in (ROOT / "lessons" / "tiny.py").read_text()


def test_each_lesson_draws_its_pictures_and_prints_its_numbers(tmp_path, capsys):
    torch.manual_seed(0)
    options = {"magnitudes": {"steps": 1}, "weights": {"steps": 33}, "noise": {"count": 50}, "sampling": {"most": 9}}
    for name, draw in figures.LESSONS.items():
        draw(tmp_path, **options.get(name, {}))
    drawn = {path.name for path in tmp_path.iterdir()}
    page = (ROOT / "lessons" / "README.md").read_text()
    shown = re.findall(r"\(\.\./images/lessons/(.*?)\)", page)
    assert drawn == set(shown) == {path.name for path in (ROOT / "images" / "lessons").iterdir()}
    said = capsys.readouterr().out
    assert "and itself: RMS 1.41" in said and "its negative: RMS 0.000" in said
    lengths = re.findall(r"(?:not )?forced *: row RMS ([\d.]+)", said)
    assert float(lengths[0]) == 1 < float(lengths[1])
    assert "rotate: lengths × 1.00 to 1.00" in (tmp_path / "rotation.svg").read_text()
    angles = {branch: max(map(float, re.findall(rf"before the {branch} ([\d.]+)", said)))
              for branch in ("attention", "MLP")}
    assert f"to {angles['MLP']:.1f} radians before the MLPs" in page and f"{angles['attention']} before the att" in page
    distance, = re.findall(r"width 0.15:.* ([\d.]+)% with 20", said)
    assert f"twenty of each width are {float(distance):.1f}% away" in " ".join(page.split())


def test_the_ideal_denoiser_is_the_mean_of_what_could_be_meant():
    images, labels = torch.randn(6, 1, 2, 2), torch.tensor([0, 0, 0, 1, 1, 1])
    denoise, x, sigma = figures.ideal(images, labels), torch.randn(2, 1, 2, 2), torch.tensor([1.3, 1e3])
    found = denoise(x, sigma, torch.tensor([1, 0]))
    likely = torch.stack([torch.distributions.Normal(image, 1.3).log_prob(x[0]).sum().exp() for image in images[3:]])
    close(found[0], (likely.view(-1, 1, 1, 1) * images[3:]).sum(0) / likely.sum(), rtol=1e-4, atol=1e-5)
    close(found[1], images[:3].mean(0), rtol=1e-2, atol=1e-2)  # all noise: any of the label
