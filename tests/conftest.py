"""What the tests share: a command run in this process, and one run by processes beside it."""

import importlib
import io
import multiprocessing.forkserver
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch.distributed as dist

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"


def run_script(words):
    from data import run_main
    sys.argv = [str(word) for word in words]
    run_main(importlib.import_module(words[0].removesuffix(".py")).main)


def call(*words):
    """What a command would do, in this process, which saves starting one: its exit code, stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), mock.patch("sys.argv"), mock.patch("signal.signal"):
        try:
            run_script(words)
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "train", "sample", "fid", "pytest", "conftest"])


def pytest_sessionstart(session):
    """Start the process whose forks the processes of a Job are: it imports everything while the first tests run."""
    multiprocessing.forkserver.ensure_running()


def work(files, environment, setup, words):
    """The life of one process of a Job."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environment)
    os.chdir(ROOT)
    setup()
    run_script(words)


def make_set(folder, images, labels, classes, held_out=None):
    """Write images (N, C, S, S) and labels (N,) as a prepared set. Returns the option for it."""
    from data import Source, write_set
    folder.mkdir()
    made = {"source": "a test", "size": None, "holdout": 0.1, "skip_broken": False}
    write_set(folder, Source(images, labels, classes, held_out, []), made, Counter())
    return f"--dataset={folder}"


class Job:
    """Processes begun as torchrun begins them, each with a command of its own. setup: what they call first."""

    def __init__(self, *commands, setup=list):
        self.out, self.err, self.processes = *(tempfile.NamedTemporaryFile("r") for _ in range(2)), []
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, words in enumerate(commands):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            environment = {name: str(value) for name, value in ranks.items() if len(commands) > 1}
            args = [self.out.name, self.err.name], environment, setup, words
            self.processes.append(FORKS.Process(target=work, args=args, daemon=True))
            self.processes[-1].start()

    def finish(self, seconds=60):
        """Wait for them, and kill those that take longer. Returns their exit codes, and what they wrote together."""
        limit = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(limit - time.monotonic(), 0))
            process.kill()
            process.join()
        texts = [Path(file.name).read_text() for file in (self.out, self.err)]
        return subprocess.CompletedProcess(None, [process.exitcode for process in self.processes], *texts)
