"""The directory of one training: its lock, its log, the state it resumes from, what is due when, and signals. Nothing
here is about diffusion: what a state consists of is passed in.

    lock = lock_run(out)  # first: whatever is large comes after it
    run = Run(config, facts, describe, lock, {"weights": model, "optimizer": optimizer})  # as it was last saved
    for step in run.steps():  # those that are left
        ...
        due = run.finish_step(loss)  # a subset of DUE
        if "save" in due:
            run.save()

All processes have a Run, and all go through the same steps; only the first one writes. Besides gradients, a step
sends one number between them: how many signals have asked to stop. No step waits for it, since it is read one step
later. Losses and errors are sent only when something is due.
"""

import json
import math
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

from plumbing.command import UserError, differences, reading, status, warn
from plumbing.config import flatten, resumable_keys, with_newer_keys
from plumbing.files import atomic_file, load_file, save_file
from plumbing.processes import begin_sum, exchange, rank, sum_over_processes, together, world_size
from plumbing.snapshots import list_snapshots

DUE = ("log", "val", "snapshot", "sample", "save")  # each has a key, log_every and so on
LOCAL = ("out", "dataset", "device", "threads")  # keys that belong to a machine: processes may differ in them


def lock_run(out):
    """Make the run directory and hold its lock while this process lives. Why: two trainings would mix their files."""
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        import fcntl
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"out: {out} is in use by another training; choose another out") from None
    except (OSError, ImportError):  # a disk without locks, or Windows
        warn(f"warning: {out} cannot be locked; start one training in it at a time")
    return lock


def newest_state(out, save_every):
    """Path and content of the newest good state of a run, None and None for a new run; and what is wrong with newer
    ones, a list of lines. Raises UserError where there was a state and none is good."""
    damaged = []
    for path in filter(os.path.lexists, (out / "state.pt", out / "state-previous.pt")):
        try:
            return path, load_file(path), damaged
        except ValueError as error:
            damaged.append(str(error))
    last = max((step for step, _, _ in list_snapshots(out / "ema")), default=0)
    if last > save_every:  # a run that was killed before its first save has earlier ones
        damaged.append(f"{out} has snapshots up to step {last}, but no state to resume from")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; choose another out")
    return None, None, []


def check_same_experiment(path, state, config, facts, describe):
    """Raises UserError if a state belongs to a different experiment: another configuration, other data, more steps."""
    if not {"config", "data", "step", "losses"} <= state.keys():
        raise UserError(f"{path}: is not the state of a training")
    if state["config"]["variant"] == config.variant:
        with reading(path, ValueError):  # for a value that this code does not allow any more
            state["config"] = with_newer_keys(state["config"], config)
    changed = differences(state["config"], flatten(config), resumable_keys(config))
    hashes = state["data"]["hashes"]
    other = [name for name, sha in facts["hashes"].items() if hashes[name] != sha]
    if not changed and other:
        changed = f"other {' and '.join(other)}: {describe(state['data'])}; not {describe(facts)}"
    if changed:
        raise UserError(f"{path}: was trained with {changed}; choose another out")
    if state["step"] > config.steps:
        raise UserError(f"{path}: already trained for {state['step']} steps; ask for more or choose another out")


class Run:
    """One training and its directory.

    step: how many steps are done. mean_loss: over the steps since the line of the log before, whenever "log" is due.
    facts: of the data, with their hashes; describe(facts): the same in one line. lock: from lock_run(). parts: what a
    state holds, by name, each with state_dict() and load_state_dict(). compiles: whether the first step also compiles
    the network, so that its time tells nothing. provenance: what the first line of a new log says. Raises UserError, on
    all processes, if the directory is in use or belongs to a different experiment, or if the processes do not agree."""

    def __init__(self, config, facts, describe, lock, parts, compiles=False, **provenance):
        self.config, self.facts, self.parts, self.out = config, facts, parts, Path(config.out)
        self.provenance = provenance
        self.step, self.saved = 0, {"config": flatten(config), "sha256": ""}
        self.losses = {"sum": 0.0, "finite": 0.0, "not finite": 0.0}  # since the last line of the log
        self.signals, self.stopping, self.compiles = [], False, compiles
        self.wishes = lambda: 0  # how many signals all processes together had got by the end of the step before
        self.seconds, self.timed = 0.0, 0  # that the last `timed` steps took together
        self.lock = lock
        with together():
            damaged = self.load(describe)
        with together():
            self.check_agreement()
            if rank() == 0:
                self.clean(damaged)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def load(self, describe):
        """Load the newest good state, if there is one. Returns what is wrong with a newer one."""
        path, state, damaged = newest_state(self.out, self.config.save_every)
        if state:
            check_same_experiment(path, state, self.config, self.facts, describe)
            for name, part in self.parts.items():
                with reading(path, RuntimeError):  # which says how the network has changed
                    part.load_state_dict(state[name])
            self.step, self.losses = state["step"], state["losses"]
            self.saved = {name: state[name] for name in ("config", "sha256")}
        return damaged

    def check_agreement(self):
        """Raises UserError unless all processes have one configuration and one dataset, and resume from one state."""
        ours = flatten(self.config) | self.facts["hashes"] | {"step": self.step, "state": self.saved["sha256"]}
        ours = json.loads(json.dumps(ours))  # where tuples become lists
        for number, text in enumerate(exchange(json.dumps(ours))):
            theirs = json.loads(text)
            if wrong := differences(theirs, ours, LOCAL):
                same = theirs["state"] == ours["state"]
                advice = "" if same else "; copy the run directory to each node, or share it"
                raise UserError(f"process {number} has {wrong}{advice}")

    def clean(self, damaged):
        """Write config.toml, take away what is later than the state, and note in the log which keys have changed."""
        if damaged:  # else it would become state-previous.pt
            warn(f"warning: {damaged[0]}; resuming from step {self.step}")
            os.replace(self.out / "state.pt", self.out / "state-damaged.pt")
        for pattern in ("state-next*", "config*", "log*", "ema/*", "samples/*"):
            for unfinished in self.out.glob(f"{pattern}.writing"):  # by a process that was killed
                unfinished.unlink()
        for step, _, path in list_snapshots(self.out / "ema"):
            if step > self.step:
                path.unlink()
        with atomic_file(self.out / "config.toml") as file:
            for name, value in flatten(self.config).items():
                file.write(f"{name} = {json.dumps(value, ensure_ascii=False)}\n".encode())
        self.cut_log()
        if not (self.out / "log.jsonl").stat().st_size:
            self.log(**self.provenance)
        if changed := differences(flatten(self.config), self.saved["config"], LOCAL):
            self.log(changed=changed)
            print(f"changed since the last training: {changed}", flush=True)

    def cut_log(self):
        """Drop the lines of the log that are later than the state: those steps are taken again. So is the note of what
        changed at the state's own step, which is written anew."""
        path = self.out / "log.jsonl"
        path.touch()
        kept = []
        with reading(path):
            for line in path.read_text().splitlines(keepends=True):
                if not line.endswith("\n"):  # written by a process that was killed
                    continue
                values = json.loads(line)
                at_state = values["step"] == self.step and "changed" not in values
                if self.step and (values["step"] < self.step or at_state):  # at step 0 all begins anew
                    kept.append(line)
        with atomic_file(path) as file:
            file.write("".join(kept).encode())

    def receive(self, number, frame):
        """Note that a signal asks to stop, so that the step can be finished and saved. A second one ends the process at
        once, except under torchrun, which sends every process a Ctrl-C that it already got."""
        self.signals.append(number)
        if world_size() == 1:
            signal.signal(number, signal.SIG_DFL)

    def steps(self):
        """Yield the numbers of the steps that are left, from 0, until a signal asks to stop. Each must be followed by
        finish_step()."""
        while self.step < self.config.steps and not self.stopping:
            self.began = time.monotonic()
            yield self.step
        if self.step < self.config.steps:
            status(f"stopped after step {self.step}, saved; the same command resumes it")

    def finish_step(self, loss):
        """Take in the loss of a step, show progress, and return what is due now, the same on all processes.
        Raises UserError if something is to be written and the loss is not finite."""
        self.step += 1
        last = self.step == self.config.steps
        due = set()
        for name in DUE:
            every = getattr(self.config, f"{name}_every")
            if last or (every and self.step % every == 0):
                due.add(name)
        finite = loss.isfinite().float()
        self.losses["sum"] += loss.nan_to_num(0.0, 0.0, 0.0)
        self.losses["finite"] += finite
        self.losses["not finite"] += 1 - finite
        self.show_progress("log" in due, last)

        self.stopping = self.is_asked_to_stop(last)
        if self.stopping:
            due.add("save")
        if due:
            self.share_losses(loss)
        if "log" in due:
            self.mean_loss = self.losses["sum"] / self.losses["finite"]
            if skipped := self.losses["not finite"]:
                warn(f"warning: up to step {self.step}, {skipped:g} losses were not finite; "
                     "such a step has no gradient")
            self.losses = dict.fromkeys(self.losses, 0.0)
        return due

    def is_asked_to_stop(self, last):
        """Whether a signal asks to stop; one to any of several processes counts from the next step on, for all of them
        at once. Why so late: whether another got one takes a round trip to know, and no step shall wait for it."""
        if world_size() == 1:
            return bool(self.signals)
        stopping = self.wishes() > 0
        if not stopping and not last:  # all sums that are begun are read before a process leaves
            self.wishes = begin_sum(len(self.signals))
        return stopping

    def share_losses(self, loss):
        """Make the losses since the last line of the log the means over all processes."""
        *sums, latest = sum_over_processes([*map(float, self.losses.values()), loss.item()])
        if not math.isfinite(latest):
            raise UserError("" if rank() else f"the loss of step {self.step} is not finite; the last saved state is "
                            "good, resume from it with a lower learning rate")
        self.losses = {name: total / world_size() for name, total in zip(self.losses, sums)}

    def show_progress(self, now, last):
        """Print the mean loss, the speed and the time left. Neither counts the first step if it compiles, nor what is
        done between finish_step() and the next step."""
        if now or self.compiles or self.seconds + time.monotonic() - self.began > 10:
            float(self.losses["sum"])  # waits for the GPU, so that the clock tells the truth
        self.seconds += time.monotonic() - self.began
        self.timed += 1
        if self.compiles:
            status(f"the first step, which compiles the network, took {self.seconds:.0f} s")
            self.compiles = False
        elif now or self.seconds > 10:
            rate = self.timed / max(self.seconds, 1e-9)
            left = timedelta(seconds=round((self.config.steps - self.step) / rate))
            status(f"step {self.step}/{self.config.steps}  loss {self.losses['sum'] / self.losses['finite']:.4f}  "
                   f"{rate * self.config.batch:.0f} images/s  {left} left", last)
        else:
            return
        self.seconds, self.timed = 0.0, 0

    def exit_code(self):
        """0, or what a shell expects of a process that a signal ended."""
        if self.step == self.config.steps:
            return 0
        return 128 + (self.signals or [signal.SIGTERM])[0]

    def log(self, **values):
        """Append a line to log.jsonl, on disk before a later state is; nothing in it depends on the clock."""
        with open(self.out / "log.jsonl", "a") as file:
            print(json.dumps({"step": self.step, **values}), file=file, flush=True)
            os.fsync(file.fileno())

    def check_lock(self):
        """Raises OSError if the directory is no longer the one that was locked."""
        path = self.out / "lock"
        if not (path.exists() and os.path.samestat(os.fstat(self.lock), os.stat(path))):
            raise OSError(f"{self.out} was deleted or moved, and another training may have its place")

    def save(self):
        """Write the state, and keep the one before it."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.step, "losses": {name: float(total) for name, total in self.losses.items()},
                  "config": flatten(self.config),
                  "data": self.facts}
        save_file(self.out / "state-next.pt", state)
        if (self.out / "state.pt").exists():
            os.replace(self.out / "state.pt", self.out / "state-previous.pt")
        os.replace(self.out / "state-next.pt", self.out / "state.pt")
