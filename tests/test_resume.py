"""Faults made for real: killed, signalled, two at once, full disks, damaged files, and nothing lost."""

import itertools
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train
from data import load_dataset
from helpers import ROOT, TINY, Job, call, done, log, make_set, run, same_losses
from plumbing.files import digest, load_file, save_file

FUZZ_ROUNDS = int(os.environ.get("FUZZ_ROUNDS", 20))  # of each kind of file
KILLS = int(os.environ.get("KILLS", 3))
BASE = ["train.py", *TINY, "--model.depth=1", "--model.num_classes=0", "--log_every=5", "--save_every=3",
        "--snapshot_every=20"]


def words(folder, steps, *more):
    return [*BASE, f"--out={folder}", f"--steps={steps}", *more]


def wait_for_step(folder, step):
    """Until the log of the run has come so far."""
    limit, path = time.monotonic() + 60, folder / "log.jsonl"
    while not path.exists() or int((re.findall(r'"step": (\d+).*\n', path.read_text()) or [0])[-1]) < step:
        assert time.monotonic() < limit
        time.sleep(0.01)


def same_run(a, b):
    names = ("step", "losses", "data", "weights", "ema", "optimizer")
    ours, theirs = ({name: load_file(folder / "state.pt")[name] for name in names} for folder in (a, b))
    ours |= {path.name: load_file(path) for path in a.glob("ema/*.pt")}
    theirs |= {path.name: load_file(path) for path in b.glob("ema/*.pt")}
    return digest(ours) == digest(theirs) and log(a) == log(b)


def assert_refused(result, *said, code=2):
    """One line, which says all of this, and this exit code, of all processes if there are several."""
    codes = result.returncode if isinstance(result.returncode, list) else [result.returncode]
    assert set(codes) == {code} and re.fullmatch(r"train\.py: .*\n", result.stderr), (codes, result.stderr)
    assert all(text in result.stderr for text in said) and len(result.stderr) < 3000, result.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done(*words(folder, 40))
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize("processes, kills, more", [
    (1, KILLS, ()), (2, -(-KILLS // 4), ["--save_every=5", "--precision=bfloat16"])])
def test_killed_again_and_again_a_run_ends_bit_for_bit_the_same(tmp_path, processes, kills, more):
    rng, killed, command = random.Random(processes), tmp_path / "killed", words(tmp_path / "killed", 25 * kills, *more)
    for _ in range(kills):
        before = log(killed)[-1]["step"] if killed.exists() else 0
        job = Job(*[command] * processes)
        wait_for_step(killed, before + 5)
        time.sleep(rng.random() * 0.1)  # anywhere, also while saving
        assert all(process.is_alive() for process in job.processes)  # it was killed, it had not ended
        job.finish(0)
    for folder in (killed, tmp_path / "whole"):
        assert Job(*[[*command, f"--out={folder}"]] * processes).finish(600).returncode == [0] * processes
    assert same_run(killed, tmp_path / "whole") and not list(killed.rglob("*.writing"))


def test_a_key_that_is_newer_than_the_run_has_its_default(whole, copy):
    state = load_file(copy / "state.pt")
    del state["sha256"], state["config"]["model.gain_rate"], state["config"]["flip"]
    del state["config"]["model.residual_t"]  # whose default follows from the depth
    save_file(copy / "state.pt", state | {"config": state["config"] | {"later": 7}})
    assert_refused(call(*words(copy, 45)), "was trained with later = 7, not None")
    save_file(copy / "state.pt", state)
    assert_refused(call(*words(copy, 45, "--model.gain_rate=0.5")), "model.gain_rate = 1.0, not 0.5")
    done(*words(copy, 45))
    assert log(copy)[:-3] == log(whole) and log(copy)[-3] == {"step": 40, "changed": "steps = 45, not 40"}


@pytest.mark.parametrize("processes, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_one_ends_all_after_their_step(whole, tmp_path, processes, number):
    job = Job(*[words(tmp_path, 40, "--micro_batch=4")] * processes)
    wait_for_step(tmp_path, 5)
    os.kill(job.processes[-1].pid, number)
    result, step = job.finish(), load_file(tmp_path / "state.pt")["step"]
    assert result.returncode == [128 + number] * processes and 5 <= step < 40
    assert f"stopped after step {step}, saved" in result.stdout and not result.stderr
    done(*words(tmp_path, 40, "--micro_batch=8"))
    assert same_losses(tmp_path, whole)


def test_when_one_process_is_killed_the_other_ends_in_one_line(tmp_path):
    job = Job(*[words(tmp_path, 100000)] * 2)
    wait_for_step(tmp_path, 5)
    job.processes[1].kill()
    result = job.finish()
    assert result.returncode == [1, -signal.SIGKILL]
    assert "train.py: another process ended, or its node cannot be reached; start the same command" in result.stderr
    assert "Traceback" not in result.stderr


def tell_messages():
    """Have the second process tell on stderr when its steps end, and what it sends and waits for."""
    def told(word, function):
        def wrapper(*args, **options):
            if os.environ["RANK"] == "1":
                print(word, end=" ", file=sys.stderr, flush=True)
            result = function(*args, **options)
            if options.get("async_op"):
                result = SimpleNamespace(wait=told("wait", result.wait))
            return result

        return wrapper

    train.optimizer_step = told("step", train.optimizer_step)
    DistributedDataParallel._sync_buffers = told("buffers", DistributedDataParallel._sync_buffers)
    for name in ("all_gather", "all_reduce"):
        setattr(dist, name, told(name, getattr(dist, name)))


def test_a_step_sends_one_wish_that_it_does_not_wait_for(tmp_path):
    command = words(tmp_path, 4, "--log_every=9", "--save_every=9", "--val_every=9", "--micro_batch=4")
    result = Job(command, command, setup=tell_messages).finish()
    assert result.returncode == [0, 0] and "step all_reduce step wait all_reduce step wait all_reduce step wait " in \
        result.stderr, result.stderr


def test_a_second_signal_ends_a_step_that_takes_long(tmp_path):
    job = Job(words(tmp_path, 40, "--batch=200000"))
    while "parameters" not in job.out.read():
        time.sleep(0.1)
    for _ in range(2):
        time.sleep(0.5)
        os.kill(job.processes[0].pid, signal.SIGINT)
    assert job.finish(5).returncode == [-signal.SIGINT] and not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("moment", range(9))
def test_a_crash_at_any_renaming_leaves_a_run_that_goes_on(whole, copy, monkeypatch, moment):
    def crash(*names):
        if next(renamings) == moment:
            raise KeyboardInterrupt
        replace(*names)

    replace, renamings = os.replace, itertools.count()
    (copy / "state.pt").write_bytes(b"")  # set aside, then step 40 is trained again
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        assert call(*words(copy, 40)).returncode == (130 if moment < 8 else 0)  # there are eight
    done(*words(copy, 40))
    assert same_run(copy, whole)


def test_a_full_disk_leaves_the_state_before_and_no_litter(copy):
    before, files = (copy / "state.pt").read_bytes(), sorted(copy.iterdir())
    job, limit = Job(words(copy, 80)), len(before) // 2  # no file may grow beyond it
    resource.prlimit(job.processes[0].pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert_refused(job.finish(), "too large", code=1)
    assert (copy / "state.pt").read_bytes() == before and sorted(copy.iterdir()) == files


def test_a_loss_that_is_not_finite_ends_the_run_unwritten(copy, monkeypatch):
    real, step, bad = train.edm2_loss, itertools.count(41), {41, 44, 45}
    patched = lambda *batch, **more: real(*batch, **more) * (float("nan") if next(step) in bad else 1)
    monkeypatch.setattr(train, "edm2_loss", patched)
    assert_refused(call(*words(copy, 80)), "the loss of step 45 is not finite")
    state = load_file(copy / "state.pt")  # step 41, where nothing was due, is left out
    assert state["step"] == 42 and state["losses"]["finite"] == 1 and state["weights"]["net.output.gain"].isfinite()


def test_losses_not_finite_are_counted_also_over_a_stop(copy, monkeypatch):
    real, step, bad = train.edm2_loss, itertools.count(41), {41, 43, 48}
    patched = lambda *batch, **more: real(*batch, **more) * (float("nan") if next(step) in bad else 1)
    monkeypatch.setattr(train, "edm2_loss", patched)
    assert_refused(call(*words(copy, 80, "--log_every=10")), "the loss of step 48 is not finite")
    result = call(*words(copy, 50, "--log_every=10"))  # from step 45
    assert result.returncode == 0 and "warning: up to step 50, 2 losses were not finite" in result.stderr


@pytest.mark.parametrize("lost, processes", [("lock", 1), (".", 1), (".", 2)])
def test_a_training_owns_its_run_and_ends_if_it_is_lost(tmp_path, lost, processes):
    folder = tmp_path / "run"
    job = Job(*[words(folder, 40000)] * processes)
    wait_for_step(folder, 5)
    assert_refused(Job(words(folder, 40000)).finish(), f"out: {folder} is in use by another training")
    assert job.processes[0].is_alive()
    (folder / lost).rename(tmp_path / "moved")
    result = job.finish()
    assert result.returncode == ([1] if processes == 1 else [2, 2]) and result.stderr.count("\n") == 1, result.stderr
    assert str(folder) in result.stderr
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    assert_refused(call(*words(tmp_path, 1)), str(tmp_path / "lock"), code=1)


def test_a_damaged_state_is_put_aside_for_the_one_before(whole, copy):
    good = (copy / "state.pt").read_bytes()
    for damaged in (b"", good[:len(good) // 2]):
        (copy / "state.pt").write_bytes(damaged)
        result = done(*words(copy, 40))
        assert f"warning: {copy / 'state.pt'}: " in result.stderr and "resuming from step 39" in result.stderr
        assert same_run(copy, whole) and (copy / "state-damaged.pt").read_bytes() == damaged
    for name in ("state.pt", "state-previous.pt"):
        (copy / name).write_bytes(b"")
    assert_refused(call(*words(copy, 40)), "state.pt: ", "state-previous.pt: ", "choose another out")
    for name in ("state.pt", "state-previous.pt"):
        (copy / name).unlink()
    assert_refused(call(*words(copy, 40)), "has snapshots up to step 40, but no state to resume from")


def test_another_experiment_is_refused_a_resumable_change_noted(whole, copy, tmp_path):
    assert_refused(call(*words(copy, 50, "--model.width=64", "--seed=3")), "seed = 0, not 3", "width = 32, not 64")
    digits = load_dataset("digits")
    images, labels = (np.concatenate([getattr(part, name) for part in (digits, digits.holdout)])
                      for name in ("images", "labels"))
    classes, held_out, end = digits.facts["classes"], np.arange(1797) >= 1697, "9 171; not 1,697 images, 10 classes: "
    for other, said in (((images, 9 - labels, classes), f"labels: 1,697 images, .* 0 167, .*{end}0 171, 1 168"),
                        ((images, labels, [*classes[:-1], "nine"]), f"classes: .*{end}.*nine 171;"),
                        ((255 - images, labels, classes), f"images: .*{end}.* 9 171;")):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        result = call(*words(copy, 50, make_set(tmp_path / "other", *other, held_out)))
        assert_refused(result, "choose another out")
        assert re.search(f"was trained with other {said}", result.stderr), result.stderr
    assert_refused(call(*words(copy, 50, "--variant=mup")), "was trained with variant = '', not 'mup'", "another out")
    assert_refused(call(*words(copy, 39)), "already trained for 40 steps")
    done(*words(copy, 40))
    assert same_run(copy, whole)  # the same again changes nothing
    moved = shutil.copytree(ROOT / "datasets" / "digits", tmp_path / "moved")
    with open(copy / "log.jsonl", "a") as file:
        file.write('{"step": 40, "changed": "by a training that saved no state"}\n')
    result = done(*words(copy, 45, "--learning_rate=0.001", f"--dataset={moved}", "--precision=bfloat16"))
    known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 cannot tell
    able = not known or any(has for name, has in known.items() if "bf16" in name)
    assert able != ("emulating it is very slow" in result.stderr)
    *before, changed, last, val_loss = log(copy)
    assert before == log(whole) and last["step"] == val_loss["step"] == 45
    assert last["learning_rate"] < before[-2]["learning_rate"] / 10
    said = "steps = 45, not 40", "learning_rate = 0.001, not 0.03", "precision = 'bfloat16', not 'auto'"
    assert changed["step"] == 40 and all(text in changed["changed"] for text in said)


def on_two_nodes():
    os.environ["GROUP_WORLD_SIZE"] = "2"


def test_processes_that_disagree_end_in_one_line_within_seconds(copy, tmp_path):
    damaged = shutil.copytree(ROOT / "datasets" / "digits", tmp_path / "damaged")
    (damaged / "images.npy").write_bytes(b"")
    other = make_set(tmp_path / "other", np.array(load_dataset("digits").images), np.arange(1697) % 10, ["a"] * 10)
    for folder, other, said in ((tmp_path / "new", "--seed=1", "process 1 has seed = 1, not 0"),
                                (tmp_path / "new", other, "process 1 has images = "),
                                (copy, f"--out={tmp_path / 'empty'}", "; copy the run directory to each node"),
                                (copy, f"--dataset={damaged}", f"{platform.node()}: {damaged}"),
                                (copy, "--stps=3", "unknown key")):
        job = Job(words(folder, 41), words(folder, 41, other), setup=on_two_nodes)
        assert_refused(job.finish(10), said)


def alter(data, rng):
    """A bit flipped, or the end cut off; in a configuration, an absurd value."""
    at, line = rng.randrange(len(data)), rng.choice(data.splitlines())
    if b" = " in line:
        absurd = b"-1 0 3 1.5 1e300 nan true [] [[1]] {} '' 'x' 1979-05-27".split() + [b"9" * 400, b"[" * 2000]
        return data.replace(line, line.split(b" = ")[0] + b" = " + rng.choice(absurd))
    return data[:at] + rng.choice([bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:], b""])


@pytest.mark.parametrize("name, command", [
    ("state.pt", [*BASE, "--steps=41", "--out=RUN"]),
    ("ema/0000040-0.100.pt", ["sample.py", "RUN", "--columns=1", "--steps=2"]),
    ("config.toml", ["train.py", "--config=RUN/config.toml", "--steps=2", "--out=RUN/new"])])
def test_altered_files_end_in_a_run_or_in_one_line(copy, name, command):
    rng, data, refused = random.Random(1), (copy / name).read_bytes(), 0
    for _ in range(FUZZ_ROUNDS):
        shutil.rmtree(copy / "new", ignore_errors=True)
        (copy / "state-previous.pt").unlink(missing_ok=True)
        (copy / name).write_bytes(alter(data, rng))
        result = call(*(word.replace("RUN", str(copy)) for word in command))
        refused += result.returncode == 2
        assert result.returncode in (0, 2) and (result.returncode == 0 or result.stderr.count("\n") == 1), result
    assert refused > FUZZ_ROUNDS / 3
