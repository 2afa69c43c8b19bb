"""Where the tests find the code, the seed of each, and the process that others are forked from."""

import multiprocessing.forkserver
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, which reads it: on busy cores threads wait for each other
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"


def pytest_sessionstart(session):
    """Start the process whose forks the processes of a Job are: it imports everything while the first tests run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "train", "sample", "fid", "pytest", "helpers"])
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def seed():
    import torch
    torch.manual_seed(0)
