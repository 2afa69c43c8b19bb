"""Devices, and the processes that torchrun starts: they join, agree, fail together and leave. Nothing here is about
diffusion. With one process, each function about several does nothing or returns what it is given."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from plumbing.command import UserError, reading, track, warn

PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name=""):
    """The device called `name`, or the best there is: cuda, mps, cpu; each of several processes gets its own GPU."""
    if not name:
        alone = "RANK" not in os.environ
        name = "cuda" if torch.cuda.is_available() else "mps" if alone and torch.backends.mps.is_available() else "cpu"
    with reading(f"device: {name[:60]!r} cannot be used"):
        if name.split(":")[0] not in ("cuda", "mps", "cpu"):
            raise ValueError("choose cuda, mps or cpu")
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, also in convolutions
    return device


def has_bfloat16(device):
    """Whether the device computes in bfloat16 rather than emulating it; True where torch cannot tell."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}  # torch 2.6 cannot tell
    return not able or any(has for name, has in able.items() if "bf16" in name)


def use_bfloat16(precision, device):
    """Whether the network runs in bfloat16: for "auto" on GPUs that have it. Warns where it would only be emulated."""
    if precision == "auto":
        return device.type == "cuda" and has_bfloat16(device)
    if precision == "bfloat16" and not has_bfloat16(device):
        warn("warning: this processor has no bfloat16, and emulating it is very slow")
    return precision == "bfloat16"


def check_compiler(device):
    """Raises UserError if torch.compile lacks what it needs on this device."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        raise UserError(f"compile: needs a C++ compiler; install {compiler}, or do not compile")


def use_compile(setting, device):
    """Whether to compile the network: setting is "true", "false", or "auto", which compiles on GPUs. Raises UserError
    if it should be compiled and cannot be."""
    if setting == "true":
        check_compiler(device)
    return setting == "true" or setting == "auto" and device.type == "cuda"


def provenance(device):
    """What a run is made with: commit (if there is git), torch, and the GPU or processor. Why: numbers can only be made
    again by whoever knows with what they were made."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")  # of Linux
        names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
        hardware = names[0] if names else platform.processor() or platform.machine()
    return {"commit": commit or "unknown", "torch": torch.__version__, "hardware": hardware}


def rank():
    """The number of this process, 0 for the first, which writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes():
    """Under torchrun, connect this process with the others. Only the first one's stdout is kept, so that all may print;
    to debug another one, print on stderr."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if os.environ["RANK"] != "0":
            sys.stdout = open(os.devnull, "w")
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=timedelta(hours=2))  # while one writes, the others wait


def leave_processes(code=0):
    """Wait for the others, who may still be writing, disconnect and exit with `code`. Why by os._exit: if Python ends
    as usual, torch.distributed (2.13) aborts it in one of ten runs, and torchrun then reports a failure."""
    if world_size() == 1:
        sys.exit(code)
    last = torch.zeros(1)  # kept, or torch 2.6 may wait here for ever
    dist.all_reduce(last)  # on the CPU: a barrier may ask for a GPU
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(code)


def gather(mine):
    """The tensors of all processes, which have one shape, in their order."""
    tensors = [mine] + [torch.empty_like(mine) for _ in range(world_size() - 1)]
    if world_size() > 1:
        dist.all_gather(tensors, mine)
    return tensors


def sum_over_processes(values):
    """The sums of some numbers over all processes."""
    return sum(gather(torch.tensor(values, dtype=torch.float64))).tolist()


def begin_sum(number):
    """Begin to add up a whole number over several processes. Returns a function that waits for the sum. Why: between
    nodes a round trip takes as long as many kernels, and who needs the sum only later need not wait for it now."""
    total = torch.tensor(number)
    sending = dist.all_reduce(total, async_op=True)

    def finish():
        sending.wait()
        return total.item()

    return finish


def exchange(text):
    """Gather one text of up to 16 KB from each process, in their order. Why as tensors: all_gather_object unpickles."""
    padded = text.encode(errors="replace").ljust(2**14, b"\0")
    tensors = gather(torch.tensor(list(padded), dtype=torch.uint8))
    return [bytes(tensor.tolist()).rstrip(b"\0").decode() for tensor in tensors]


@contextmanager
def together():
    """A part in which a process may raise UserError or OSError: then all of them raise UserError. Why: so that the
    error is printed once, and no process waits for one that has ended."""
    cause, text = None, ""
    try:
        yield
    except (UserError, OSError) as error:
        if world_size() == 1:
            raise
        cause, text = error, str(error)[:2000]
        if text and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:  # of nodes, one of which lacks a file, say
            text = f"{platform.node()}: {text}"
    text = next(filter(None, exchange(text)), "")
    if text:
        raise UserError(text if os.environ.get("LOCAL_RANK", "0") == "0" else "") from cause


def draw_in_shares(draw, total, batch):
    """Draw samples 0..total-1, `batch` at a time in each process. Yields the numbers of this process' share and what
    draw(numbers) makes of them. Why shares are equal, and the last numbers wrap around: gather() wants tensors of one
    shape. Samples that are drawn twice come last, and collect() cuts them off."""
    at_once = batch * world_size()
    starts = range(0, total, at_once)
    for start in track(starts, "images", total, lambda start: min(at_once, total - start)):
        share = min(batch, -(-(total - start) // world_size()))
        first = start + rank() * share
        numbers = [number % total for number in range(first, first + share)]
        yield numbers, draw(numbers)


def collect(shares, total, folder):
    """What draw_in_shares() yields in all processes, as one array in the first process; None in the others. It is
    mapped from a nameless file in `folder`, since memory may not hold it."""
    scratch = tempfile.TemporaryFile(dir=folder) if rank() == 0 else None
    left = total
    for _, images in shares:
        images = torch.cat(gather(images.contiguous()))[:left].numpy()
        left -= len(images)
        if scratch:
            scratch.write(images)
    if scratch:
        scratch.flush()
        return np.memmap(scratch, images.dtype, "r", shape=(total, *images.shape[1:]))
