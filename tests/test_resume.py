"""Faults made for real: killed, signalled, two at once, full disks, damaged files, and nothing lost."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from conftest import ROOT, call
from sample import load_denoiser
from test_end_to_end import TINY, done, launcher, log, run

FUZZ_ROUNDS = int(os.environ.get("FUZZ_ROUNDS", 12))                        # of each kind of file
KILLS = int(os.environ.get("KILLS", 3))
BASE = [*TINY, "--save_every=3", "--snapshot_every=20", "--log_every=5", "--sample_every=0"]


def start(*options, processes=1, **more):
    return subprocess.Popen([*launcher(processes), "train.py", *map(str, options)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)


def kill_tree(process):
    """SIGKILL for a process and, under torchrun, its workers, which lead groups of their own."""
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in (process.pid, *map(int, workers)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()


def wait_for_step(folder, step, seconds=60):
    """Until the log of the run has come so far."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path = folder / "log.jsonl"
        if path.exists() and any(line.endswith("\n") and json.loads(line)["step"] >= step for line in path.read_text().splitlines(keepends=True)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} after {seconds} s")


def load(folder, name="state.pt"):
    return torch.load(folder / name, weights_only=True)


def same(a, b):
    """Bit-identical, whatever is nested in what."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def same_run(a, b):
    ours, theirs = load(a), load(b)
    names = ("progress", "weights", "ema", "optimizer", "data")
    snapshots = sorted(path.name for path in (a / "ema").glob("*.pt"))
    return (all(same(ours[name], theirs[name]) for name in names) and log(a) == log(b)
            and snapshots == sorted(path.name for path in (b / "ema").glob("*.pt"))
            and all(same(load(a / "ema", name), load(b / "ema", name)) for name in snapshots))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of 40 steps."""
    folder = tmp_path_factory.mktemp("whole")
    done("train.py", *BASE, "--steps=40", f"--out={folder}")
    return folder


@pytest.mark.parametrize("processes, count", [(1, KILLS), (2, -(-KILLS // 4))])
def test_killed_again_and_again_a_run_ends_bit_for_bit_the_same(tmp_path, processes, count):
    rng, options, whole, tmp_path = random.Random(processes), [*BASE, f"--steps={45 * count}"], tmp_path / "whole", tmp_path / "killed"
    command = done if processes == 1 else lambda *words: run(*words, processes=processes)
    command("train.py", *options, f"--out={whole}")
    for _ in range(count):
        process = start(*options, f"--out={tmp_path}", processes=processes)
        before = log(tmp_path)[-1]["step"] if (tmp_path / "log.jsonl").exists() and log(tmp_path) else 0
        wait_for_step(tmp_path, before + rng.choice((5, 5, 10, 20)))
        time.sleep(rng.random() * 0.1)                                      # anywhere, also while saving
        assert process.poll() is None                                       # it was killed, it had not ended
        kill_tree(process)
    command("train.py", *options, f"--out={tmp_path}")
    if processes == 1:
        assert same_run(tmp_path, whole)
    for name in ("weights", "ema", "optimizer"):                            # the loss in the log adds up in another order
        assert same(load(tmp_path)[name], load(whole)[name])
    assert not list(tmp_path.rglob("*.writing"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits_with_its_code(whole, tmp_path, number):
    process = start(*BASE, "--steps=40", f"--out={tmp_path}")
    wait_for_step(tmp_path, 5)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and re.fullmatch(rf"train.py: {number.name}: stopped after step \d+, saved; .*\n", err)
    assert load(tmp_path)["progress"]["step"] == int(re.search(r"step (\d+)", err)[1])
    done("train.py", *BASE, "--steps=40", f"--out={tmp_path}")
    assert same_run(tmp_path, whole)


def test_a_second_signal_ends_at_once(tmp_path):
    process = start(*BASE, "--steps=2", "--batch=60000", f"--out={tmp_path}")               # a step that takes long
    end = time.monotonic() + 60
    while not (tmp_path / "config.toml").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 143 and not (tmp_path / "state.pt").exists()


def test_a_run_moves_between_numbers_of_processes_and_micro_batches(tmp_path):
    options = [*TINY[:-1], "--batch=64", "--save_every=50", "--sample_every=0"]
    done("train.py", *options, "--steps=50", f"--out={tmp_path / 'whole'}")
    for steps, processes, micro in ((15, 1, 0), (35, 2, 16), (50, 1, 16)):
        words = ["train.py", *options, f"--steps={steps}", f"--micro_batch={micro}", f"--out={tmp_path / 'moved'}"]
        run(*words, processes=processes) if processes > 1 else done(*words)
    ours, theirs = ([line for line in log(tmp_path / name) if "loss" in line] for name in ("moved", "whole"))
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-4)
    ours, theirs = (torch.cat([w.flatten() for w in load(tmp_path / name)["weights"].values()]) for name in ("moved", "whole"))
    assert (ours - theirs).norm() / theirs.norm() < 1e-4


def test_a_dead_process_ends_the_job_and_the_run_goes_on(whole, tmp_path):
    process = start(*BASE, "--steps=40000", f"--out={tmp_path}", processes=2)
    wait_for_step(tmp_path, 10)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    begin = time.monotonic()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 20 and process.returncode != 0
    assert "train.py: another process died" in err
    step = load(tmp_path)["progress"]["step"]
    assert step >= 9 and f"step {step + 5 - step % 5}/" in done("train.py", *BASE, f"--steps={step + 5}", f"--out={tmp_path}").stdout


def test_two_trainings_do_not_share_a_run_and_a_dead_ones_lock_does_not_hold(tmp_path):
    process = start(*BASE, "--steps=40000", f"--out={tmp_path}")
    wait_for_step(tmp_path, 10)
    result = call("train.py", *BASE, "--steps=40000", f"--out={tmp_path}")
    assert result.returncode == 2 and result.stderr.startswith(f"train.py: out: {tmp_path} is in use by process {process.pid} on ")
    assert result.stderr.count("\n") == 1 and process.poll() is None
    process.kill()
    process.communicate()
    assert (tmp_path / "lock").read_text().startswith(f"process {process.pid} ")
    done("train.py", *BASE, f"--steps={load(tmp_path)['progress']['step'] + 1}", f"--out={tmp_path}")


def test_damaged_states_are_named_and_the_one_before_is_taken(whole, tmp_path):
    for damage in (lambda data: data[:len(data) // 2], lambda data: b""):
        shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
        path = tmp_path / "run" / "state.pt"
        path.write_bytes(damage(path.read_bytes()))
        assert load(tmp_path / "run", "state-previous.pt")["progress"]["step"] == 39
        result = done("train.py", *BASE, "--steps=40", f"--out={tmp_path / 'run'}")
        assert f"warning: {path}: " in result.stderr and "going on from state-previous.pt, step 39" in result.stderr
        assert same_run(tmp_path / "run", whole)
        assert (tmp_path / "run" / "state-damaged.pt").read_bytes() == damage((whole / "state.pt").read_bytes())
    for name in ("state.pt", "state-previous.pt"):
        (tmp_path / "run" / name).write_bytes(b"")
    result = call("train.py", *BASE, "--steps=40", f"--out={tmp_path / 'run'}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "state.pt: damaged" in result.stderr and "state-previous.pt: damaged" in result.stderr
    for name in ("state.pt", "state-previous.pt"):
        (tmp_path / "run" / name).unlink()
    result = call("train.py", *BASE, "--steps=40", f"--out={tmp_path / 'run'}")
    assert result.returncode == 2 and "has snapshots up to step 40, but no state to go on from" in result.stderr


@pytest.mark.parametrize("moment", range(6))
def test_a_crash_at_any_renaming_leaves_a_run_that_goes_on(whole, tmp_path, monkeypatch, moment):
    """From a damaged state on: the log, then the snapshots and the state of step 40 fall into place one after the other."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "state.pt").write_bytes(b"")
    replace, calls = os.replace, []

    def crash(*names):
        calls.append(names)
        if len(calls) > moment:
            raise KeyboardInterrupt
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            call("train.py", *BASE, "--steps=40", f"--out={tmp_path}")
    done("train.py", *BASE, "--steps=40", f"--out={tmp_path}")
    assert same_run(tmp_path, whole)


def test_a_finished_run_started_again_changes_nothing(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    result = done("train.py", *BASE, "--steps=40", f"--out={tmp_path}")
    assert "already trained for 40 steps" in result.stdout and result.stdout.endswith(f"{tmp_path}/samples/0000040.png\n")
    assert same_run(tmp_path, whole)


def test_killed_while_streaming_nothing_is_left_behind(tmp_path, monkeypatch):
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), i).save(tmp_path / "images" / label / f"{i}.png")
    options = [*BASE, f"--dataset={tmp_path / 'images'}", "--workers=1", "--threads=1", f"--out={tmp_path / 'run'}"]
    program = "import data; data.IN_MEMORY = 0; import train; train.main()"
    process = subprocess.Popen([sys.executable, "-c", program, *options, "--steps=40000"], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for_step(tmp_path / "run", 10)
    workers = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]
    assert workers
    process.kill()
    process.wait()
    step = load(tmp_path / "run")["progress"]["step"]
    monkeypatch.setattr("data.IN_MEMORY", 0)
    done("train.py", *options, f"--steps={step + 1}")
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)

def test_a_changed_config_is_refused_or_applied_and_noted(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    result = call("train.py", *BASE, "--steps=50", f"--out={tmp_path}", "--model.width=64", "--seed=3")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "seed = 0, not 3" in result.stderr and "model.width = 32, not 64" in result.stderr
    assert same_run(tmp_path, whole)
    done("train.py", *BASE, "--steps=45", f"--out={tmp_path}", "--learning_rate=0.001", "--micro_batch=8")
    lines = log(tmp_path)
    assert lines[8] == {"step": 40, "images": 640, "changed": {"learning_rate": [0.03, 0.001], "micro_batch": [0, 8], "steps": [40, 45]}}
    assert lines[:8] == log(whole) and lines[9]["step"] == 45 and lines[9]["learning_rate"] < lines[7]["learning_rate"] / 10


def test_a_diverging_run_stops_and_keeps_its_last_good_state(whole, tmp_path):
    """An infinite noise level makes every loss NaN, from the very step where it is turned on."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    state = load(tmp_path)
    state["config"]["p_mean"] = 1000.0
    torch.save(state, tmp_path / "state.pt")
    result = call("train.py", *BASE, "--steps=400", f"--out={tmp_path}", "--p_mean=1000", "--give_up_after=7")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "the loss has not been finite for 8 steps, up to 48; the last good state is of step 40" in result.stderr
    lines = log(tmp_path)
    assert lines[-1]["step"] == 45 and lines[-1]["loss"] is None and lines[-1]["nonfinite"] > 0
    assert same(load(tmp_path)["weights"], state["weights"]) and load(tmp_path)["progress"]["step"] == 40
    result = call("train.py", *BASE, "--steps=43", f"--out={tmp_path}", "--p_mean=1000")     # too few to give up, and nothing to show
    assert result.returncode == 1 and "the last good state is of step 40" in result.stderr and not list(tmp_path.glob("samples/*43.png"))


def test_a_full_disk_leaves_the_state_before_and_no_litter(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "state.pt").read_bytes()
    files = sorted(path.name for path in tmp_path.iterdir())
    limit = len(before) // 2                                                # no file may grow beyond it
    process = start(*BASE, "--steps=80", f"--out={tmp_path}", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count("\n") == 1
    assert err.startswith(f"train.py: cannot write to {tmp_path} (") and "the same command goes on from it" in err
    assert (tmp_path / "state.pt").read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == files
    done("train.py", *BASE, "--steps=41", f"--out={tmp_path}")


# ---- fuzz: a working run or one clear line ----

def mutate_bytes(data, rng):
    data = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        del data[rng.randrange(len(data)):]
    elif kind == 2:
        begin = rng.randrange(len(data))
        del data[begin:begin + rng.randrange(1, 2000)]
    else:                                                                   # the directory at the end, where the structure is
        for _ in range(rng.randrange(1, 6)):
            data[-rng.randrange(1, min(3000, len(data)))] = rng.randrange(256)
    return bytes(data)


def mutate_tree(tree, rng):
    """Swap, drop, or replace by something absurd a random part of nested dicts."""
    parent = tree
    while True:
        name = rng.choice(list(parent))
        if isinstance(parent[name], dict) and parent[name] and rng.random() < 0.8:
            parent = parent[name]
            continue
        kind = rng.randrange(4)
        if kind == 0:
            del parent[name]
        elif kind == 1:
            parent[name] = rng.choice([None, -1, 10**9, 1e300, float("nan"), "x" * 100, [], {}, torch.zeros(3), 10**30, True])
        elif kind == 2:
            other = rng.choice(list(parent))
            parent[name], parent[other] = parent[other], parent[name]
        else:
            parent[str(name) + "x"] = parent.pop(name)
        return


def attempt(capsys, monkeypatch, *options):
    """Run train.py in this process: True if it worked, else it ended in one clear line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    monkeypatch.setattr(train, "Signals", type("Signals", (), {"seen": 0}))
    monkeypatch.setattr(train, "write_samples", lambda *args: None)
    try:
        train.main()
        code = 0
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code in (0, 1, 2) and "Traceback" not in err
    if code:
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("train.py: ") and len(lines[0]) < 3000, err
    return code == 0


def test_mutated_states_end_in_a_run_or_in_one_line(whole, tmp_path, monkeypatch, capsys):
    rng, worked = random.Random(1), 0
    shutil.copytree(whole, tmp_path / "run")
    assert attempt(capsys, monkeypatch, *BASE, "--steps=41", f"--out={tmp_path / 'run'}")   # as it is, it works
    shutil.rmtree(tmp_path / "run")
    data = (whole / "state.pt").read_bytes()
    for i in range(FUZZ_ROUNDS):
        (tmp_path / "run").mkdir()
        if i % 2:
            (tmp_path / "run" / "state.pt").write_bytes(mutate_bytes(data, rng))
        else:
            state = load(whole)
            mutate_tree(state, rng)
            torch.save(state, tmp_path / "run" / "state.pt")
        worked += attempt(capsys, monkeypatch, *BASE, "--steps=41", f"--out={tmp_path / 'run'}")
        shutil.rmtree(tmp_path / "run")
    assert worked < FUZZ_ROUNDS


def test_mutated_snapshots_end_in_a_denoiser_or_in_one_line(whole, tmp_path):
    rng, worked = random.Random(2), 0
    source = whole / "ema" / "0000040-0.100.pt"
    for i in range(4 * FUZZ_ROUNDS):
        path = tmp_path / source.name
        if i % 2:
            path.write_bytes(mutate_bytes(source.read_bytes(), rng))
        else:
            snapshot = load(source.parent, source.name)
            mutate_tree(snapshot, rng)
            torch.save(snapshot, path)
        try:
            denoiser, _ = load_denoiser(path, torch.device("cpu"))
            with torch.no_grad():
                denoiser(torch.zeros(1, 1, 8, 8), 1.0)
            worked += 1
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
    assert 0 < worked < 4 * FUZZ_ROUNDS


def test_mutated_configs_end_in_a_run_or_in_one_line(tmp_path, monkeypatch, capsys):
    rng, worked = random.Random(3), 0
    text = (ROOT / "configs" / "digits.toml").read_text()
    values = ["-1", "0", "1e300", "nan", "inf", "10000000000", "99999999999999999999999", '"x"', "true", "[]", "[1, 2]", "[0.05]", "{}", "1.5", "3", '""',
              '["rotate"]', '["rotate", 3]', "[[1]]", "1979-05-27", "'mp'", "'plain'"]
    for _ in range(2 * FUZZ_ROUNDS):
        lines = text.splitlines()
        for _ in range(rng.randrange(1, 3)):
            at = rng.choice([i for i, line in enumerate(lines) if "=" in line and not line.startswith("#")])
            kind = rng.randrange(4)
            if kind < 2:
                lines[at] = lines[at].split("=")[0] + "= " + rng.choice(values)
            elif kind == 2:
                lines[at] = lines[at].replace(rng.choice(lines[at]), rng.choice("=[]\"'.x\0é"), 1)
            else:
                del lines[at]
        path = tmp_path / "fuzz.toml"
        path.write_text("\n".join(lines))
        limits = ["--steps=2", "--batch=8", "--sample_every=0", f"--out={tmp_path / 'run'}", "--save_every=2"]
        worked += attempt(capsys, monkeypatch, f"--config={path}", *limits)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert 0 < worked < 2 * FUZZ_ROUNDS
