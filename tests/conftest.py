"""Where the tests find the code, the seed of each, and the process that others are forked from."""

import multiprocessing.forkserver
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"


def pytest_sessionstart(session):
    """Start the process whose forks the processes of a Job are: it imports everything while the first tests run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "train", "sample", "fid", "pytest", "helpers"])
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
