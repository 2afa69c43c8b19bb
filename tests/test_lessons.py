"""The lessons do what the real code does, and no page leads nowhere."""

import re

import torch

from data import load_dataset
from helpers import CPU, ROOT, close
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
