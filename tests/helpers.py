"""What the tests share: commands run in this process or beside it, sets and networks to try things on, a reference for
Inception."""

import importlib
import io
import json
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import Denoiser
from train import magnitudes

ROOT = Path(__file__).parent.parent
TINY = [f"--config={ROOT}/configs/digits.toml", "--device=cpu", "--model.depth=2", "--model.width=32",
        "--model.heads=2", "--log_every=1", "--save_every=10", "--batch=16",
        "--optimizer=adam", "--schedule=sqrt", "--learning_rate=0.03"]
FAMILIES = ("mp", "plain")
CPU = torch.device("cpu")
close = torch.testing.assert_close
FORKS = multiprocessing.get_context("forkserver")


def run_script(words):
    from plumbing.command import run_main
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


def done(*command):
    result = call(*command)
    assert result.returncode == 0, result.stderr
    return result


def run(*words):
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stderr
    return result.stdout


def log(folder):
    """The lines of a log but for the first, which says on what machine it was made."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and {"commit", "torch", "hardware", "precision"} < lines[0].keys()
    assert all("torch" not in line for line in lines[1:])
    return lines[1:]


def same_losses(a, b, rel=1e-4):
    ours, theirs = ([line["loss"] for line in log(folder) if "loss" in line] for folder in (a, b))
    return ours == pytest.approx(theirs, rel=rel)


def make_set(folder, images, labels, classes, held_out=None):
    """Write images (N, C, S, S) and labels (N,) as a prepared set. Returns the option for it."""
    from prepare.sets import write_set
    from prepare.sources import Source
    folder.mkdir()
    made = {"source": "a test", "size": None, "holdout": 0.1, "skip_broken": False}
    write_set(folder, Source(images, labels, classes, held_out, []), made, Counter())
    return f"--dataset={folder}"


def work(files, environment, setup, words):
    """The life of one process of a Job."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with & ignore Ctrl-C
    os.chdir(ROOT)
    setup()
    run_script(words)


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


def rms(x):
    return x.square().mean(-1).sqrt()


def turned(x, theta):
    """Rotation as the multiplication of complex numbers."""
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * theta)
    return torch.cat([z.real, z.imag], dim=-1)


def awake(model):
    """The model with its zero-initialised gains and layers set to something, so that every part acts."""
    for p in model.parameters():
        if not p.any():
            p.data.normal_(std=0.3)
    return model


@torch.no_grad()
def initial_rms(config):
    """Token RMS after each block of a new network. magnitudes() must report three of them, and leave no hooks."""
    denoiser, labels, seen = Denoiser(config), torch.arange(2), []
    images, noise = torch.randn(2, 2, config.channels, config.image_size, config.image_size) / 2**0.5
    x = (images + noise) * 1.25**0.5  # c_in makes it 1
    reported = magnitudes(denoiser, images * 1.25**0.5, labels, torch.ones(2), noise * 1.25**0.5)
    assert not any(block._forward_hooks for block in denoiser.net.blocks)
    for block in denoiser.net.blocks:
        block.register_forward_hook(lambda block, inputs, tokens: seen.append(rms(tokens).mean().item()))
    denoiser(x, 1.0, labels)
    names = ("token_rms_first", "token_rms_middle", "token_rms_last", "weight_rms")
    assert reported == pytest.approx(dict(zip(names, [seen[0], seen[len(seen) // 2], seen[-1], 1])), rel=1e-5)
    return seen


def count_parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in config.network().parameters())


def second_inception(x):
    """The network written down once more, from the names and widths of the public weights file: the features of images
    in -1..1, and the weights, which are made on the way, random but so that activations stay alive."""
    generator, state = torch.Generator().manual_seed(0), {}

    def conv(x, name, width, kernel=1, **options):
        rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        w = torch.randn(width, x.shape[1], rows, columns, generator=generator)
        w *= (2 / w[0].numel()) ** 0.5
        mean, var, gain, bias = (torch.rand(width, generator=generator) * 0.2 + value for value in (0.1, 1, 1, 0.1))
        state.update({f"{name}.conv.weight": w, f"{name}.bn.weight": gain, f"{name}.bn.bias": bias,
                      f"{name}.bn.running_mean": mean, f"{name}.bn.running_var": var,
                      f"{name}.bn.num_batches_tracked": torch.tensor(0)})
        return F.batch_norm(F.conv2d(x, w, **options), mean, var, gain, bias, eps=1e-3).clamp(min=0)

    def chain(x, name, *layers):  # name_1, name_2, ... of unchanged size
        for i, (width, kernel) in enumerate(layers, 1):
            x = conv(x, f"{name}_{i}", width, kernel, padding="same")
        return x

    def average(x):  # over those pixels of a window that exist
        sums, counts = (F.avg_pool2d(y, 3, 1, 1, divisor_override=1) for y in (x, torch.ones_like(x)))
        return sums / counts

    row, column = (1, 7), (7, 1)
    x = conv(conv(x, "Conv2d_1a_3x3", 32, 3, stride=2), "Conv2d_2a_3x3", 32, 3)
    x = conv(F.max_pool2d(conv(x, "Conv2d_2b_3x3", 64, 3, padding=1), 3, 2), "Conv2d_3b_1x1", 80)
    x = F.max_pool2d(conv(x, "Conv2d_4a_3x3", 192, 3), 3, 2)
    for m, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = torch.cat([conv(x, f"{m}.branch1x1", 64), chain(x, f"{m}.branch5x5", (48, 1), (64, 5)),
                       chain(x, f"{m}.branch3x3dbl", (64, 1), (96, 3), (96, 3)),
                       conv(average(x), f"{m}.branch_pool", width)], 1)
    double = conv(chain(x, "Mixed_6a.branch3x3dbl", (64, 1), (96, 3)), "Mixed_6a.branch3x3dbl_3", 96, 3, stride=2)
    x = torch.cat([conv(x, "Mixed_6a.branch3x3", 384, 3, stride=2), double, F.max_pool2d(x, 3, 2)], 1)
    for m, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        single = chain(x, f"{m}.branch7x7", (c, 1), (c, row), (192, column))
        double = chain(x, f"{m}.branch7x7dbl", (c, 1), (c, column), (c, row), (c, column), (192, row))
        x = torch.cat([conv(x, f"{m}.branch1x1", 192), single, double, conv(average(x), f"{m}.branch_pool", 192)], 1)
    single = conv(chain(x, "Mixed_7a.branch3x3", (192, 1)), "Mixed_7a.branch3x3_2", 320, 3, stride=2)
    double = chain(x, "Mixed_7a.branch7x7x3", (192, 1), (192, row), (192, column))
    x = torch.cat([single, conv(double, "Mixed_7a.branch7x7x3_4", 192, 3, stride=2), F.max_pool2d(x, 3, 2)], 1)
    for m, pool in (("Mixed_7b", average), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        forks = [(chain(x, f"{m}.branch3x3", (384, 1)), f"{m}.branch3x3_2"),
                 (chain(x, f"{m}.branch3x3dbl", (448, 1), (384, 3)), f"{m}.branch3x3dbl_3")]
        pairs = [conv(y, f"{name}{letter}", 384, kernel, padding="same")
                 for y, name in forks for letter, kernel in (("a", (1, 3)), ("b", (3, 1)))]
        x = torch.cat([conv(x, f"{m}.branch1x1", 320), *pairs, conv(pool(x), f"{m}.branch_pool", 192)], 1)
    return x.flatten(2).mean(2), state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
