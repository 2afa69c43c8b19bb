"""What must hold on a GPU as it does on a CPU. Each test runs on both, so that without a GPU the tests themselves are
tried; there nothing is compiled, which test_model.py does, and gloo takes the place of NCCL."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from helpers import FAMILIES, TINY, awake, close, done, log, same_losses
from layers import attention
from model import Denoiser, DiTConfig, edm2_loss
from plumbing.files import load_file
from plumbing.processes import begin_sum

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_CUDA)]


def small_denoiser(family):
    config = DiTConfig(block=family, depth=2, width=64, heads=2, image_size=8, channels=1, num_classes=3)
    return awake(Denoiser(config))


def gradients(denoiser, device, bfloat16=False, model=None):
    """All gradients of one loss, as one vector on the CPU. model: what DDP makes of the denoiser."""
    denoiser.in_bfloat16 = bfloat16
    generator = torch.Generator().manual_seed(1)
    images, noise = torch.randn(2, 8, 1, 8, 8, generator=generator).to(device)
    sigma, labels = torch.linspace(0.1, 3, 8, device=device), (torch.arange(8) % 4).to(device)
    denoiser.zero_grad()
    edm2_loss(model or denoiser, denoiser.uncertainty(sigma), images, labels, sigma, noise).backward()
    return torch.cat([p.grad.flatten() for p in denoiser.parameters()]).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_and_its_gradients_are_those_of_the_formula(device, dtype, tolerance):
    q, k, v, weights = torch.randn(4, 2, 3, 64, 16).to(dtype)
    ours = [x.to(device, copy=True).requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    powers = (exact[0] @ exact[1].mT / math.sqrt(16)).exp()
    expected = powers / powers.sum(-1, keepdim=True) @ exact[2]
    result = attention(*ours)
    close(result.cpu().double(), expected, rtol=0, atol=tolerance)
    (result * weights.to(device)).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(ours, exact):
        close(x.grad.cpu().double(), y.grad, rtol=0, atol=5 * tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_and_in_bfloat16_gradients_are_those_of_eager_float32_on_a_cpu(device, family):
    denoiser = small_denoiser(family)
    expected = gradients(denoiser, "cpu")
    denoiser.to(device)
    for compiled in (False, True)[:1 + (device == "cuda")]:
        if compiled:
            denoiser.net.compile()
        for bfloat16, least, most in ((False, 0, 1e-4), (True, 1e-3, 0.03)):
            error = (gradients(denoiser, device, bfloat16) - expected).norm() / expected.norm()
            assert least <= error < most, (compiled, bfloat16)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_on_the_device_resumes_with_the_losses_of_one_that_never_stopped(device, tmp_path):
    command = ["train.py", *TINY, f"--device={device}", "--model.depth=1", "--model.num_classes=0"]
    done(*command, "--steps=4", f"--out={tmp_path / 'whole'}")
    for steps in (2, 4):
        done(*command, f"--steps={steps}", f"--out={tmp_path / 'resumed'}", "--snapshot_every=4")
    assert same_losses(tmp_path / "resumed", tmp_path / "whole") and len(log(tmp_path / "whole")) == 5
    ours, theirs = (load_file(tmp_path / name / "state.pt")["weights"] for name in ("resumed", "whole"))
    close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_go_over_nccl_and_the_wish_to_stop_over_gloo(device):
    denoiser = small_denoiser("mp").to(device)
    expected = gradients(denoiser, device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                            world_size=1)
    try:
        model = DistributedDataParallel(denoiser)
        wish = begin_sum(3)
        close(gradients(denoiser, device, model=model), expected)
        assert wish() == 3
    finally:
        dist.destroy_process_group()
