"""The real commands, as subprocesses, on the real digits."""

import json
import os
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, call

TINY = [f"--config={ROOT}/configs/digits.toml", "--device=cpu", "--model.depth=2", "--model.width=32", "--model.heads=2", "--log_every=1",
        "--save_every=10", "--batch=16"]


def launcher(processes):
    """Python, or torchrun on a free port."""
    if processes == 1:
        return [sys.executable]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1", f"--master_port={port}"]


def run(*command, processes=1, ok=True):
    result = subprocess.run([*launcher(processes), *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=170,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    if ok:
        assert result.returncode == 0, result.stderr
    return result


def done(*command):
    """The same for one process, in this one."""
    result = call(*command)
    assert result.returncode == 0, result.stderr
    return result


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = run("train.py", *TINY, "--steps=20", f"--out={folder}", "--sample_every=10", "--snapshot_every=10")
    return folder, result.stdout


def test_training_writes_all_it_promises(trained):
    folder, printed = trained
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "config.toml", "ema/0000010-0.050.pt", "ema/0000010-0.100.pt", "ema/0000020-0.050.pt", "ema/0000020-0.100.pt",
        "lock", "log.jsonl", "samples/0000010.png", "samples/0000020.png", "state-previous.pt", "state.pt"]
    lines = log(folder)
    assert [line["step"] for line in lines] == list(range(1, 21)) and lines[-1]["images"] == 320
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["weight_rms"] == pytest.approx(1, abs=1e-3) and line["nonfinite"] == 0
        assert all(0.5 < line[f"token_rms_{where}"] < 2 for where in ("first", "middle", "last"))
    assert "step 20/20  loss " in printed and "images/s" in printed and "left" in printed
    assert Image.open(folder / "samples" / "0000020.png").size == (10 * 66 + 2, 10 * 66 + 2)
    state = torch.load(folder / "state.pt", weights_only=True)
    for name, weight in state["weights"].items():
        if name.endswith(("qkv.weight", "linear.weight")):
            assert weight.square().mean(1).sqrt().sub(1).abs().max() < 1e-5


def test_two_processes_follow_the_same_loss_curve_as_one(trained, tmp_path):
    folder, _ = trained
    run("train.py", *TINY, "--steps=20", f"--out={tmp_path}", "--micro_batch=4", processes=2)
    for one, two in zip(log(folder), log(tmp_path), strict=True):
        assert two["images"] == one["images"] and two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_a_run_started_again_goes_on_as_if_it_had_never_stopped(trained, tmp_path):
    folder, _ = trained
    done("train.py", *TINY, "--steps=10", f"--out={tmp_path}")
    result = done("train.py", *TINY, "--steps=20", f"--out={tmp_path}")
    assert "step 11/20" in result.stdout and "step 10/20" not in result.stdout
    lines = log(tmp_path)
    assert lines.pop(10) == {"step": 10, "images": 160, "changed": {"steps": [10, 20]}} and lines == log(folder)
    ours, theirs = (torch.load(f / "ema" / "0000020-0.100.pt", weights_only=True)["weights"] for f in (tmp_path, folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_config_a_run_saves_gives_the_same_run(trained, tmp_path):
    folder, _ = trained
    done("train.py", f"--config={folder / 'config.toml'}", "--steps=3", f"--out={tmp_path}")
    assert log(tmp_path) == log(folder)[:3]


def test_plain_and_unconditional_networks_train_and_sample(tmp_path):
    done("train.py", *TINY, "--steps=2", f"--out={tmp_path}", "--model.block=plain", "--model.num_classes=0", "--learning_rate=1e-4")
    result = done("sample.py", tmp_path, "--columns=3", "--steps=2")
    assert Image.open(result.stdout.strip()).size == (3 * 66 + 2, 66 + 2)


def test_sample_draws_the_classes_asked_for(trained, tmp_path):
    folder, _ = trained
    result = run("sample.py", folder, "--labels", "7", "2", "--columns=3", "--steps=4", "--ema=0.05", f"--out={tmp_path / 'a.png'}")
    assert result.stdout.strip() == str(tmp_path / "a.png") and "6/6 images" in result.stderr
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (2 * 66 + 2, 3 * 66 + 2) and picture.std() > 10
    run("sample.py", folder, "--labels", "2", "--columns=3", "--steps=4", "--ema=0.05", "--seed=3", f"--out={tmp_path / 'b.png'}")
    again = np.asarray(Image.open(tmp_path / "b.png"))
    assert np.abs(picture[66:].astype(int) - again.astype(int)).max() <= 1          # same seeds, same label, same images


def test_two_processes_draw_the_same_images_as_one(trained, tmp_path):
    folder, _ = trained
    options = ["--labels", "7", "2", "--columns=3", "--steps=4", "--churn=2", "--guidance=2", "--ema=0.08"]
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    done("sample.py", folder, *options, f"--out={one}")
    run("sample.py", folder, *options, f"--out={two}", "--batch=2", processes=2)
    run("sample.py", folder, *options, f"--out={tmp_path / 'pngs'}", "--seed=7", processes=2)
    with np.load(one) as a, np.load(two) as b:
        assert a["arr_0"].shape == (6, 8, 8, 1) and a["arr_0"].dtype == np.uint8 and a["labels"].tolist() == [7, 7, 7, 2, 2, 2]
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1 and (a["labels"] == b["labels"]).all()
    assert sorted(p.name for p in (tmp_path / "pngs").iterdir()) == [f"{seed:06d}.png" for seed in range(7, 13)]
    done("sample.py", folder, *options, f"--out={tmp_path / 'seven.npz'}", "--seed=7")
    with np.load(tmp_path / "seven.npz") as a:
        for seed, image in enumerate(a["arr_0"], 7):
            png = np.asarray(Image.open(tmp_path / "pngs" / f"{seed:06d}.png"))
            assert np.abs(png.astype(int) - image[..., 0]).max() <= 1


def test_reconstructions_are_taken_by_name_and_by_width(trained, tmp_path):
    folder, _ = trained
    result = done("ema.py", folder, "--std", "0.06", "0.2")
    paths = result.stdout.split()
    assert paths == [f"{folder}/ema/posthoc/0000020-0.060.pt", f"{folder}/ema/posthoc/0000020-0.200.pt"]
    assert "EMA width 0.2 is beyond" in result.stderr and "4/4 snapshots read" in result.stderr
    for source in ([paths[0]], [folder, "--ema=0.06"]):
        done("sample.py", *source, "--columns=2", "--steps=2", f"--out={tmp_path / 'a.png'}", "--gif")
        picture = (tmp_path / "a.png").read_bytes()
        assert Image.open(tmp_path / "a.gif").n_frames == 3
    done("sample.py", paths[0], "--columns=2", "--steps=2", f"--out={tmp_path / 'b.png'}", "--guidance=3", f"--guide={paths[0]}")
    assert (tmp_path / "b.png").read_bytes() == picture                     # guided by itself


def test_latents_from_a_zip_train_alike_on_two_processes_and_sample_to_npz(tmp_path):
    generator, latents = np.random.default_rng(0), tmp_path / "latents.zip"
    with zipfile.ZipFile(latents, "w") as file:
        for i in range(40):
            with file.open(f"00000/img-mean-std-{i:08d}.npy", "w") as entry:
                np.save(entry, np.concatenate([generator.normal(3, 2, (4, 8, 8)), np.ones((4, 8, 8))]).astype(np.float32))
        file.writestr("dataset.json", json.dumps({"labels": [[f"00000/img-mean-std-{i:08d}.npy", i % 2] for i in range(40)]}))
    options = [*TINY, f"--dataset={latents}", "--steps=4", "--flip=true", "--workers=1"]
    done("train.py", *options, f"--out={tmp_path / 'one'}")
    run("train.py", *options, f"--out={tmp_path / 'two'}", "--micro_batch=4", processes=2)
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    with np.load(tmp_path / "one" / "samples" / "0000004.npz") as file:
        assert file["latents"].shape == (20, 4, 8, 8) and file["latents"].dtype == np.float32
    result = done("sample.py", tmp_path / "one", "--columns=2", "--steps=2", f"--out={tmp_path / 'a.npz'}")
    with np.load(tmp_path / "a.npz") as file:
        assert file["latents"].shape == (4, 4, 8, 8)
    result = call("sample.py", tmp_path / "one", f"--out={tmp_path / 'a.png'}")
    assert result.returncode == 2 and "install diffusers" in result.stderr and result.stderr.count("\n") == 1


def test_data_describes_and_draws(tmp_path):
    pixels = np.round(np.load(ROOT / "datasets" / "digits.npz", allow_pickle=False)["images"] * (255 / 16)).astype(int)
    result = run("data.py", "digits", "-o", tmp_path / "sheet.png")
    assert result.stdout.splitlines() == ["1,797 images, 8x8, 1 channels, in memory", "10 classes, 174 to 183 images each",
                                          f"channel 0: mean {pixels.mean():.3f}, standard deviation {pixels.std():.3f}", str(tmp_path / "sheet.png")]
    assert Image.open(tmp_path / "sheet.png").size == (10 * 66 + 2, 10 * 66 + 2)
    result = run("data.py", tmp_path / "nowhere", ok=False)
    assert result.returncode == 2 and "there is no" in result.stderr and result.stderr.count("\n") == 1


def test_two_processes_measure_the_same_as_one_and_a_sweep_draws_its_plot(trained, tmp_path):
    folder, _ = trained
    options = ["--features=pixels", "--count=30", "--seed=5"]
    for processes, name in ((1, "one.npz"), (2, "two.npz")):
        run("fid.py", "stats", folder, f"--out={tmp_path / name}", *options, "--batch=9", processes=processes)
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert one["count"] == two["count"] == 30
        np.testing.assert_allclose(two["mu"], one["mu"], atol=1e-3)          # a pixel may round to the other side
        np.testing.assert_allclose(two["sigma"], one["sigma"], atol=1e-3)
    result = done("fid.py", "sweep", folder, "--std", "0.1", "0.05", *options, f"--out={tmp_path / 'sweep.png'}")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("EMA width 0.100  distance ") and lines[1].startswith("EMA width 0.050") and lines[2].startswith("best: ")
    single = done("fid.py", folder, "digits", "--ema=0.05", *options).stdout
    assert lines[1].split()[-1] == single.strip()
    assert Image.open(tmp_path / "sweep.png").size == (480, 320)


MISTAKES = [
    (["train.py", "--config=nowhere.toml"], "train.py: --config: nowhere.toml: No such file"),
    (["train.py", "--stps=3"], "train.py: --stps: unknown key; did you mean 'steps'?"),
    (["train.py", "--dataset=digit"], "train.py: dataset: there is no 'digit': no file"),
    (["train.py", "--model.patch=3"], "train.py: model.patch: image_size = 8 is not divisible by 3"),
    (["train.py", "--device=abacus"], "train.py: device: 'abacus' cannot be used"),
    (["train.py", "--batch=7", "--micro_batch=2"], "train.py: micro_batch: 2 does not divide the 7 images"),
    (["train.py", "--out=LICENSE/run"], "train.py: out: cannot write the run directory LICENSE/run"),
    (["sample.py", "nowhere"], "sample.py: error: nowhere: no such run or snapshot"),
    (["sample.py", "RUN", "--labels", "3", "10"], "sample.py: error: --labels: there is no class 10; the run knows 0 to 9"),
    (["sample.py", "RUN", "--steps=1"], "sample.py: error: --steps: must be at least 2, not 1"),
    (["sample.py", "RUN", "--ema=0.3"], "sample.py: error: an EMA width must lie between 0 and 0.289"),
    (["sample.py", "RUN", "--guidance=2", "--guidance-interval", "5", "1"], "sample.py: error: --guidance-interval: 5 to 1 is upside down"),
    (["sample.py", "RUN", "--guide-ema=0.05"], "sample.py: error: --guide-ema: does nothing at --guidance=1"),
    (["sample.py", "RUN", "--guidance=2", "--guide=nowhere"], "sample.py: error: nowhere: no such run or snapshot"),
    (["sample.py", "RUN", "--gif", "--out=a.npz"], "sample.py: error: --gif: goes with a grid"),
    (["ema.py", "nowhere", "--std", "0.1"], "ema.py: error: nowhere: there are no snapshots"),
    (["ema.py", "RUN", "--std", "0.29"], "ema.py: error: an EMA width must lie between 0 and 0.289"),
    (["ema.py", "RUN", "--std", "0.1", "--step=15"], "ema.py: error: RUN/ema: no snapshot at step 15; the nearest is at"),
    (["train.py", *TINY, "--out=RUN", "--seed=1"], "train.py: RUN/state.pt: was trained with seed = 0, not 1"),
    (["train.py", *TINY, "--out=RUN", "--model.patch=4"], "train.py: RUN/state.pt: was trained with model.patch = 2, not 4"),
    (["train.py", *TINY, "--out=RUN", "--steps=19"], "train.py: RUN/state.pt: already trained for 20 steps"),
    (["sample.py", "RUN", "--out=LICENSE/a.png"], "sample.py: error: --out: cannot write to LICENSE"),
    (["sample.py", "RUN", "--seed=4294967290"], "sample.py: error: --seed: must leave"),
]


@pytest.mark.parametrize("command, message", MISTAKES, ids=[" ".join(command) for command, _ in MISTAKES])
def test_mistakes_are_one_clear_line_and_exit_code_2(trained, command, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = str(trained[0])
    result = call(*(word.replace("RUN", folder) for word in command))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(message.replace("RUN", folder))


@pytest.mark.parametrize("command", [["train.py", "--stps=3"], ["sample.py", "nowhere"], ["fid.py", "nowhere", "digits", "--features=pixels"]])
def test_a_mistaken_command_as_the_shell_sees_it(command):
    result = run(*command, ok=False)
    assert result.returncode == 2 and result.stderr.startswith(command[0]) and "Traceback" not in result.stderr


def test_sample_without_any_run_says_how_to_get_one(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "sample.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "no run with a snapshot" in result.stderr and result.stderr.count("\n") == 1


def test_help_lists_every_key():
    printed = run("train.py", "--help").stdout
    assert "--learning_rate=0.01" in printed and "--model.block=mp" in printed and "--model.patch=2" in printed and "--ema_stds=0.05,0.1" in printed
