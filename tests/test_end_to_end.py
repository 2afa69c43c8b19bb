"""The real commands, on the real digits."""

import re
import subprocess
import sys
import warnings
from functools import partialmethod

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import train
from data import load_dataset
from helpers import ROOT, TINY, Job, call, close, done, log, make_set, run, same_losses
from plumbing.config import load_config
from plumbing.files import load_file

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('a "quoted" näme')
    command = ["train.py", *TINY, "--steps=8", "--sample_every=4", "--snapshot_every=4", f"--out={folder}"]
    return folder, command, run(*command)


def test_training_writes_all_it_promises(trained):
    folder, command, printed = trained
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "config.toml", "ema/0000004-0.050.pt", "ema/0000004-0.100.pt", "ema/0000008-0.050.pt", "ema/0000008-0.100.pt",
        "lock", "log.jsonl", "samples/0000004.png", "samples/0000008.png", "state.pt"]
    *lines, last = log(folder)
    assert [line["step"] for line in lines] == list(range(1, 9)) and "step 8/8  loss " in printed
    assert list(last) == ["step", "val_loss", "error_by_sigma"] and last["step"] == 8 and 0.5 < last["val_loss"] < 2
    assert len(last["error_by_sigma"]) == 10 and np.mean(last["error_by_sigma"]) == pytest.approx(last["val_loss"])
    for line in lines:
        assert list(line) == ["step", "images", "learning_rate", "loss", "gradient_norm", "token_rms_first",
                              "token_rms_middle", "token_rms_last", "weight_rms"]
        assert line["weight_rms"] == pytest.approx(1, abs=1e-3) and 0.5 < line["token_rms_last"] < 2
    config = load_config(train.TrainConfig, command[1:])
    config.model = config.model.for_data(8, 1, 10)  # what a run saves gives the same run
    assert load_config(train.TrainConfig, [f"--config={folder / 'config.toml'}"]) == config


def test_two_processes_follow_the_same_loss_curve_as_one(trained, tmp_path):
    run(*TORCHRUN, *trained[1], f"--out={tmp_path}", "--micro_batch=4", "--sample_every=0", "--val_every=4")
    assert same_losses(tmp_path, trained[0]) and len(log(tmp_path)) == 8 + 2
    assert log(tmp_path)[-1]["val_loss"] == pytest.approx(log(trained[0])[-1]["val_loss"], rel=1e-5)


def freeze_input():
    """Have training freeze its input layer, and compile with the quickest backend, which needs no C++ compiler."""
    def patched(*words):
        denoiser, *others = build(*words)
        denoiser.net.input.requires_grad_(False)
        return denoiser, *others

    build, train.build, train.check_compiler = train.build, patched, print
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")


def test_two_compiled_processes_follow_one_that_is_not_compiled(tmp_path):
    latents = np.random.default_rng(0).normal(3, 2, (40, 8, 8, 8)).astype(np.float32)
    latents[:, 4:] = 1  # standard deviations
    options = ["--steps=3", "--snapshot_every=1", "--model.depth=1", "--model.block=plain", "--learning_rate=0.001",
               "--optimizer=muon"]
    dataset = make_set(tmp_path / "latents", latents, np.arange(40) % 2, ["a", "b"])
    for processes, compiled in ((1, "false"), (2, "true")):
        command = ["train.py", *TINY, *options, dataset, f"--out={tmp_path / str(processes)}", f"--compile={compiled}"]
        result = Job(*[command] * processes, setup=freeze_input).finish(120)
        assert result.returncode == [0] * processes, result.stderr
        assert ("the first step, which compiles the network, took" in result.stdout) == (compiled == "true")
        assert f"step 3  val_loss {log(tmp_path / str(processes))[-1]['val_loss']:.4f}\n" in result.stdout
    assert same_losses(tmp_path / "2", tmp_path / "1", rel=1e-5) and log(tmp_path / "1")[-1]["val_loss"] > 0
    first, last = (load_file(tmp_path / "2" / "ema" / f"000000{step}-0.050.pt")["weights"] for step in (1, 3))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert "net.blocks.0.mlp.0.weight" in moved and not any(name.startswith("net.input.") for name in moved)
    done("sample.py", tmp_path / "1", "--columns=2", "--steps=2", f"--out={tmp_path / 'a.npz'}")
    for path, count in ((tmp_path / "a.npz", 4), (tmp_path / "1" / "samples" / "0000003.npz", 20)):
        assert np.load(path)["latents"].shape == (count, 4, 8, 8)


def test_two_processes_draw_and_measure_the_same_images_as_one(trained, tmp_path):
    draw = ["sample.py", trained[0], "--columns=1", "--steps=4", "--guidance=2", "--ema=0.08"]
    measure = ["fid.py", "stats", trained[0], "--features=pixels", "--count=30", "--seed=5"]
    for command, close in ((draw, {"labels": 0, "arr_0": 1}), (measure, {"count": 0, "mu": 1e-3, "sigma": 1e-3})):
        done(*command, f"--out={tmp_path / 'one.npz'}")
        assert Job(*[[*command, f"--out={tmp_path / 'two.npz'}", "--batch=4"]] * 2).finish().returncode == [0, 0]
        with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
            for name, atol in close.items():  # a pixel may round to the other side
                np.testing.assert_allclose(two[name].astype(float), one[name].astype(float), rtol=0, atol=atol)


def test_distance_of_a_run_is_that_of_its_samples_to_its_data(trained, tmp_path):
    options = ["--count=200", "--guidance=1.5", "--seed=3", "--ema=0.05"]
    done("sample.py", trained[0], *options, f"--out={tmp_path / 'a.npz'}")
    images, digits = np.load(tmp_path / "a.npz")["arr_0"], load_dataset("digits")
    x, y = (array.reshape(len(array), 64) / 127.5 - 1 for array in (images, digits.images))
    with warnings.catch_warnings(action="ignore"):  # the corners are always black, so it is singular
        root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    result = done("fid.py", "compare", trained[0], "digits", "--features=pixels", *options)
    assert float(result.stdout) == pytest.approx(expected, rel=1e-3)
    assert "digits: 1,697 images, 8x8, grey, as the run's\n" in result.stderr
    (tmp_path / "wide").mkdir()
    for i, image in enumerate(digits.images[:60, 0]):  # in colour, and with more at both sides
        Image.fromarray(np.dstack([np.pad(image, ((0, 0), (3, 3)))] * 3)).save(tmp_path / "wide" / f"{i:02d}.png")
    np.savez(tmp_path / "same.npz", digits.images[:60, 0])
    wide, same = (done("fid.py", "compare", source, trained[0], "--features=pixels", "--count=60").stdout
                  for source in (tmp_path / "wide", tmp_path / "same.npz"))
    assert wide == same


def test_each_cell_of_a_sweep_is_the_distance_compare_gives(trained, tmp_path):
    plot, options = tmp_path / "sweep.svg", ["--features=pixels", "--count=30", "--seed=3"]
    sweep = ["fid.py", "sweep", trained[0], "--std", "0.1", "0.05", *options, f"--plot={plot}"]
    result = done(*sweep, "--guidance", "1", "2.5")
    head, *rows, best, name = result.stdout.splitlines()
    assert re.split(" {2,}", head) == ["EMA width", "guidance 1", "guidance 2.5"] and name == str(plot)
    table = {std: list(map(float, values)) for std, *values in map(str.split, rows)}
    assert list(table) == ["0.100", "0.050"] and len({value for row in table.values() for value in row}) == 4
    single = done("fid.py", "compare", trained[0], "digits", "--ema=0.05", "--guidance=2.5", *options)
    assert float(single.stdout) == table["0.050"][1]
    (std, row), = ((std, row) for std, row in table.items() if min(row) == min(map(min, table.values())))
    assert best == f"best: EMA width {std}, guidance {('1', '2.5')[row.index(min(row))]}"
    drawn = plot.read_text()
    assert drawn.startswith("<svg") and all(f">guidance {strength}<" in drawn for strength in ("1", "2.5"))
    result = call("fid.py", "compare", trained[0], "digits", *options, "--guidance", "1", "2")
    assert result.returncode == 2 and result.stderr == "fid.py: --guidance: only sweep takes several\n"


@pytest.mark.parametrize("command", ["fid.py compare digits digits --features=pixels", "train.py --help"])
def test_a_reader_who_closes_the_pipe_sees_no_traceback(command):
    command = f"unset PYTHONUNBUFFERED; {sys.executable} {command} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and re.fullmatch(r"(digits.*\n)*\w+.py: .*Broken pipe\n", result.stderr)
