"""A run that starts from another one's averaged weights: --init."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import train
from data import load_dataset
from helpers import ROOT, TINY, Job, call, close, done, log, make_set, same_losses
from layers import MPEmbedding, MPLinear, force_weight_normalization
from plumbing.files import digest, load_file
from plumbing.transfer import transfer
from sample import load_denoiser

DIGITS = load_dataset("digits")


def hurry():
    """Trainings draw no samples and hardly look at held-out images, which would take longer than their few steps."""
    patch = pytest.MonkeyPatch()
    patch.setattr("train.save_samples", lambda *run: None)
    patch.setattr("train.VALIDATION_PAIRS", train.VALIDATION_BATCH)
    return patch


@pytest.fixture(scope="module", autouse=True)
def hurried():
    patch = hurry()
    yield
    patch.undo()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of three steps on the digits, with a high rate, so that its averages are far from rows of RMS 1."""
    folder = tmp_path_factory.mktemp("source")
    done("train.py", *TINY, "--steps=3", "--learning_rate=1", "--warmup_steps=0", f"--out={folder}")
    return folder


@pytest.fixture
def other(tmp_path):
    """The option for a set of the digits 7, a new class, and 2, in this order."""
    labels = np.array(DIGITS.labels)
    images = np.concatenate([DIGITS.images[labels == digit] for digit in (7, 4, 2)])
    numbers = np.repeat([0, 1, 2], [(labels == digit).sum() for digit in (7, 4, 2)])
    return make_set(tmp_path / "set", images, numbers, ["7", "new", "2"], np.arange(len(images)) % 10 == 0)


def weights_of(folder):
    return load_file(folder / "state.pt")["weights"]


def test_tensors_move_by_name_and_shape_and_classes_by_name():
    ours = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1), "x.label.weight": torch.zeros(4, 2)}
    theirs = {"a": torch.ones(2).half(), "b": torch.ones(4), "d": torch.ones(1),
              "x.label.weight": torch.tensor([[1.0, 1], [2, 2], [9, 9]])}
    assert transfer(ours, theirs, ["bee", "cat", "ant"], ["ant", "bee"]) == ["b", "c", "class cat"]
    close(ours, {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.zeros(1),
                 "x.label.weight": torch.tensor([[2.0, 2], [0, 0], [1, 1], [9, 9]])})
    none = {"label.weight": torch.zeros(1, 2)}  # of a network without labels
    assert not transfer(none, {"label.weight": theirs["x.label.weight"]}, [], ["ant", "bee"])
    close(none["label.weight"], torch.tensor([[9.0, 9]]))
    columns, theirs = {"label.weight": torch.zeros(5, 2)}, {"label.weight": torch.arange(15.0).view(5, 3)}
    assert transfer(columns, theirs, ["c", "d"], ["a", "b", "c"]) == ["class d"]  # a layer that reads one-hot labels
    close(columns["label.weight"], torch.stack([torch.arange(2.0, 15, 3), torch.zeros(5)], dim=1))
    wide = {"label.weight": torch.zeros(3, 4)}
    assert transfer(wide, {"label.weight": torch.ones(3, 2)}, ["a", "b"], ["a", "b"]) == [
        "class a", "class b", "the null label"]


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_run_starts_from_the_widest_average_at_rms_1(source, other, tmp_path, snapshot):
    path = source / "ema" / "0000003-0.100.pt" if snapshot else source
    run = tmp_path / "run"
    result = done("train.py", *TINY, other, f"--init={path}", "--steps=1", "--learning_rate=1e-9", "--seed=1",
                  f"--out={run}")
    assert f"starts from {path}; fresh: class new\n" in result.stdout
    denoiser, _ = load_denoiser(source / "ema" / "0000003-0.100.pt", torch.device("cpu"))
    lengths = [module.weight.square().mean(1) for module in denoiser.modules()
               if isinstance(module, (MPLinear, MPEmbedding))]
    assert torch.cat(lengths).min() < 0.99  # so that it matters that rows are forced back
    force_weight_normalization(denoiser)
    expected, ours = denoiser.state_dict(), weights_of(run)
    theirs, table = expected.pop("net.input.label.weight"), ours.pop("net.input.label.weight")
    close(ours, expected, rtol=1e-4, atol=1e-5)
    close(table[[0, 2, 3]], theirs[[7, 2, 10]], rtol=1e-4, atol=1e-5)
    assert (table[1] @ theirs.T / 32).abs().max() < 0.7  # the new class is none of the old ones
    close(table.square().mean(1), torch.ones(4))
    line = json.loads((run / "log.jsonl").read_text().splitlines()[1])
    digest_of_source = load_file(source / "ema" / "0000003-0.100.pt")["sha256"]
    assert line == {"step": 0, "init": str(path), "sha256": digest_of_source, "fresh": ["class new"]}


def test_the_first_step_finds_rows_of_rms_1_and_averages_alike(source, tmp_path, monkeypatch):
    def watch(config, dataset, denoiser, ema, optimizer, run):
        assert ema.step == 0
        for module in denoiser.modules():
            if isinstance(module, (MPLinear, MPEmbedding)):
                close(module.weight.square().mean(1), torch.ones(len(module.weight)), rtol=0, atol=1e-5)
        for average in ema.averages.values():
            close(average.state_dict(), denoiser.state_dict(), rtol=0, atol=0)
        run.step = config.steps

    monkeypatch.setattr("train.train", watch)
    done("train.py", *TINY, f"--init={source}", "--steps=1", f"--out={tmp_path / 'run'}")


def test_what_does_not_fit_is_listed_and_starts_as_without_init(source, tmp_path):
    options = ["train.py", *TINY, "--model.patch=4", "--model.num_classes=0", "--steps=1", "--learning_rate=1e-9"]
    listed = ("net.input.position", "net.input.patch.weight", "net.output.linear.weight")
    result = done(*options, f"--init={source}", f"--out={tmp_path / 'tuned'}")
    assert f"fresh: {', '.join(listed)}\n" in result.stdout
    done(*options, f"--out={tmp_path / 'fresh'}")
    tuned, fresh = weights_of(tmp_path / "tuned"), weights_of(tmp_path / "fresh")
    same = {name for name in fresh if torch.allclose(tuned[name], fresh[name], atol=1e-5)}
    assert same == set(listed)
    result = done(*options, "--model.depth=4", f"--init={source}", f"--out={tmp_path / 'deep'}")
    fresh = log(tmp_path / "deep")[0]["fresh"]
    blocks = {name.split(".")[2] for name in fresh if ".blocks." in name}
    assert blocks == {"2", "3"} and f"{', '.join(fresh[:20])} and {len(fresh) - 20} more\n" in result.stdout


def test_resumed_without_its_source_a_run_ends_the_same(source, other, tmp_path):
    moved, run = shutil.copytree(source, tmp_path / "moved"), tmp_path / "run"
    command = ["train.py", *TINY, other, f"--init={moved}", "--steps=6", "--save_every=3", f"--out={run}"]
    done(*command)
    whole, lines = weights_of(run), (run / "log.jsonl").read_text()
    for source_is_there in (True, False):
        shutil.copy(run / "state-previous.pt", run / "state.pt")
        assert load_file(run / "state.pt")["step"] == 3
        if not source_is_there:
            shutil.rmtree(moved)
        assert "starts from" not in done(*command).stdout
        assert digest(weights_of(run)) == digest(whole) and (run / "log.jsonl").read_text() == lines
    result = call(*command, f"--init={source}")
    assert result.returncode == 2 and "was trained with init = " in result.stderr and "another out" in result.stderr


def test_two_processes_start_from_a_source_as_one_does(source, other, tmp_path):
    command = ["train.py", *TINY, other, f"--init={source}", "--steps=2"]
    for count in (1, 2):
        result = Job(*[[*command, f"--out={tmp_path / str(count)}"]] * count, setup=hurry).finish()
        assert result.returncode == [0] * count and result.stdout.count("starts from") == 1, result.stderr
    assert same_losses(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize("path, said", [
    ("nowhere", "nowhere: there is no such file"), ("SOURCE/state.pt", "is not the snapshot of a denoiser"),
    ("SOURCE/config.toml", "config.toml: damaged, or not a file of this kind"), ("EMPTY", "there is no snapshot"),
    ("PRETRAINED", "is another network: width = 96, here 32")])
def test_a_source_that_cannot_be_used_is_one_line(source, tmp_path, path, said):
    (tmp_path / "empty").mkdir()
    path = path.replace("SOURCE", str(source)).replace("EMPTY", str(tmp_path / "empty"))
    path = path.replace("PRETRAINED", str(ROOT / "pretrained" / "digits.pt"))
    result = call("train.py", *TINY, f"--init={path}", "--steps=1", f"--out={tmp_path / 'run'}")
    assert result.returncode == 2 and re.fullmatch(r"train\.py: .*\n", result.stderr) and said in result.stderr
