"""Both networks, the denoiser and its loss against the papers' equations, and their derivatives of every kind."""

import dataclasses
import math
import shutil

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from helpers import FAMILIES, awake, close, count_parameters, initial_rms, rms, turned
from layers import MPMLP, mp_sum, normalize, rotate
from model import (SIZES, Denoiser, DiT, DiTConfig, PlainBlock, PlainInput, PlainOutput, edm2_loss,
                   position_embedding)
from train import magnitudes

SMALL = dict(depth=3, width=32, heads=2, patch=2, image_size=8, channels=3, num_classes=5)


@pytest.mark.parametrize("wrong", [
    dict(width=100, heads=3), dict(width=6, heads=1), dict(patch=3, image_size=8), dict(patch=1, image_size=512),
    dict(modulation=("turn",)), dict(modulation=()), dict(modulation="gate"), dict(block="x"), dict(size=3),
    dict(label_dropout=1.5), dict(label_dropout=math.nan), dict(depth=-1), dict(depth=2.0), dict(depth=True)])
def test_impossible_configurations_are_refused_by_key(wrong):
    with pytest.raises(ValueError, match=f"^({'|'.join(wrong)}): .*$"):
        DiTConfig(**wrong)


def test_a_configuration_takes_its_shape_by_size_and_data():
    facts = dict(image_size=8, channels=3, num_classes=10)
    for size, (depth, width, heads) in SIZES.items():
        config = DiTConfig(size=size).for_data(**facts)
        assert config == DiTConfig(size=size, depth=depth, width=width, heads=heads, **facts)
        assert config == DiTConfig(**dataclasses.asdict(config)) == config.for_data(**facts)
    assert DiTConfig(num_classes=0).for_data(**facts).num_classes == 0  # unconditional
    for name in facts:
        with pytest.raises(ValueError, match=f"^{name}: 16, but the dataset has {facts[name]}"):
            DiTConfig(**{name: 16}).for_data(**facts)


@pytest.mark.parametrize("size, grid", [("XS", 16), ("S", 4)])
def test_28_mp_blocks_keep_token_rms_near_1_at_initialisation(size, grid):
    seen = initial_rms(DiTConfig(size=size, depth=28, image_size=2 * grid, channels=4, num_classes=10))
    assert len(seen) == 28 and 0.75 < min(seen) and max(seen) < 1.25


def test_parameter_counts_are_the_published_ones():
    """DiT, Table 4: S has 33 million, B 130 million. MaP-DiT: rotation instead of shift saves 5.4%."""
    latents = dict(patch=4, image_size=32, channels=4, num_classes=1000)
    for size, published in (("S", 33e6), ("B", 130e6)):
        assert count_parameters(DiTConfig(block="plain", size=size, **latents)) == pytest.approx(published, rel=0.02)
    rotate, shift = (count_parameters(DiTConfig(modulation=(kind, "scale", "gate"), **latents))
                     for kind in ("rotate", "shift"))
    assert rotate / shift == pytest.approx(1 - 0.054, abs=0.003)


@pytest.mark.parametrize("block", FAMILIES)
@pytest.mark.parametrize("patch, channels, num_classes", [(1, 1, 10), (2, 3, 0), (8, 4, 1000)])
def test_output_starts_at_zero_and_all_have_gradients(block, patch, channels, num_classes):
    sizes = dict(block=block, patch=patch, channels=channels, num_classes=num_classes)
    net, x, labels = DiT(DiTConfig(**SMALL | sizes)), torch.randn(2, channels, 8, 8), torch.tensor([0, num_classes])
    assert torch.equal(net(x, torch.randn(2), labels), torch.zeros_like(x))
    awake(net)(x, torch.randn(2), labels).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_patches_are_cut_row_by_row_and_put_back_in_place():
    net, x, seen = DiT(DiTConfig(**SMALL)), torch.randn(2, 3, 8, 8), []
    net.input.forward = lambda patches, c_noise, labels: (patches, None)
    net.output.forward = lambda x, cond: x
    net.run_blocks = lambda x, cond: seen.append(x) or x
    assert torch.equal(net(x, None, None), x)
    patches = [x[:, :, row:row + 2, column:column + 2].flatten(1) for row in (0, 2, 4, 6) for column in (0, 2, 4, 6)]
    assert torch.equal(seen[0], torch.stack(patches, dim=1))


def test_mp_block_is_the_papers_equations():
    block = awake(DiT(DiTConfig(**SMALL, residual_t=0.3))).blocks[0]
    x, cond = torch.randn(2, 16, 32), torch.randn(2, 32)

    def values(modulation, *sizes):
        values = cond @ F.normalize(modulation.linear.weight, dim=1).T
        return [gain * value for gain, value in zip(modulation.gain, values[:, None].split(sizes, dim=-1))]

    def branch(modulation, layer, gate, x):
        scale, theta = values(modulation, 32, 16)
        return (1 + values(gate, 32)[0]) * layer(turned(x * (1 + scale), theta))

    h = (0.7 * x + 0.3 * branch(block.modulation1, block.attention, block.gate1, x)) / 0.58**0.5
    h = (0.7 * h + 0.3 * branch(block.modulation2, block.mlp, block.gate2, h)) / 0.58**0.5
    close(block(x, cond), h, rtol=1e-4, atol=1e-4)


def test_plain_block_is_adaln_zero_and_starts_as_the_identity():
    block, x, cond = DiT(DiTConfig(**SMALL, block="plain")).blocks[0], torch.randn(2, 16, 32), torch.randn(2, 32)
    x *= 0.01  # so that LayerNorm's eps counts
    assert torch.equal(block(x, cond), x)
    awake(block)
    reference, weights = nn.MultiheadAttention(32, 2, batch_first=True), block.attention.state_dict()
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    reference.load_state_dict(dict(zip(names, weights.values())))
    scale1, shift1, gate1, scale2, shift2, gate2 = block.modulation(cond).view(2, 6, 1, 32).unbind(1)
    a = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale1) + shift1
    h = x + gate1 * reference(a, a, a)[0]
    a = F.layer_norm(h, (32,), eps=1e-6) * (1 + scale2) + shift2
    h = h + gate2 * block.mlp[2](F.gelu(block.mlp[0](a), approximate="tanh"))
    close(block(x, cond), h, rtol=1e-4, atol=1e-4)


def test_position_embedding_is_that_of_row_and_column():
    f = 10000 ** (-torch.arange(16) / 16)
    for place, token in enumerate(position_embedding(64, 5)):
        row, column = place // 5 * f, place % 5 * f
        close(token, torch.cat([row.sin(), row.cos(), column.sin(), column.cos()]))


def test_mp_positions_are_centred_and_the_input_keeps_its_share():
    position = DiT(DiTConfig(**SMALL)).input.position
    close(rms(position), torch.ones(16))
    assert F.cosine_similarity(position[:1], position[1:]).min() < -0.1  # uncentred, all are alike: 0.69 and more
    for depth in (4, 9, 36, 100):
        t = DiTConfig(depth=depth).residual_t
        close(t, 0.6 / depth**0.5)
        assert 0.5 < ((1 - t) / ((1 - t) ** 2 + t**2) ** 0.5) ** (2 * depth) < 0.7


@pytest.mark.parametrize("block", FAMILIES)
def test_denoiser_is_edms_table_1_and_none_is_the_null_label(block):
    denoiser, sigma = awake(Denoiser(DiTConfig(**SMALL, block=block))), torch.tensor([1e-6, 0.5, 80.0])
    x, s, labels = torch.randn(3, 3, 8, 8), sigma.view(3, 1, 1, 1), torch.tensor([0, 5, 2])
    norm = (s**2 + 0.25).sqrt()
    out = denoiser.net(x / norm, sigma.log() / 4, labels)
    close(denoiser(x, sigma, labels), 0.25 / norm**2 * x + s * 0.5 / norm * out, rtol=1e-4, atol=1e-4)
    close(denoiser(x, 1e-6), x, rtol=0, atol=1e-4)  # without noise nothing is left to do
    assert torch.equal(denoiser(x, 2.0), denoiser(x, torch.full((3,), 2.0), torch.tensor([5, 5, 5])))
    assert (denoiser(x, 2.0) - denoiser(x, 2.0, labels))[0].abs().max() > 1e-3


def test_loss_is_the_weighted_error_over_exp_u_plus_u():
    denoiser, y, noise = awake(Denoiser(DiTConfig(**SMALL))), torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    sigma, labels, expected = torch.tensor([0.1, 0.5, 1.0, 10.0]), torch.arange(4), 0
    for i, s in enumerate(sigma.tolist()):
        features = denoiser.u_fourier(torch.tensor([math.log(s) / 4]))[0]
        u = (features @ F.normalize(denoiser.u_linear.weight[0], dim=0)).item()
        error = denoiser(y[i:i + 1] + s * noise[i], s, labels[i:i + 1]) - y[i]
        expected += ((s**2 + 0.25) / (s * 0.5) ** 2 / math.exp(u) * error.square().mean().item() + u) / 4
    loss = edm2_loss(denoiser, denoiser.uncertainty(sigma), y, labels, sigma, noise)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


class Loss(nn.Module):
    """The loss of a small denoiser as a module in which all parameters act, and a batch for it."""

    def __init__(self, block):
        super().__init__()
        self.denoiser = awake(Denoiser(DiTConfig(**SMALL | dict(depth=1), block=block)))
        self.batch = torch.randn(3, 3, 8, 8), torch.tensor([0, 3, 5]), torch.tensor([.1, 1, 9]), torch.randn(3, 3, 8, 8)

    def forward(self, *batch):
        return edm2_loss(self.denoiser, self.denoiser.uncertainty(batch[2]), *batch)

    def gradients(self, *batch, **options):
        gradients = torch.autograd.grad(self(*batch), list(self.parameters()), **options)
        return dict(zip(dict(self.named_parameters()), gradients))


@pytest.mark.parametrize("block", FAMILIES)
def test_vmap_and_second_derivatives_are_those_of_a_loop(block):
    loss = Loss(block)
    batch, parameters = [part[:, None] for part in loss.batch], dict(loss.named_parameters())
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    gradient = torch.func.grad(lambda parameters, *batch: torch.func.functional_call(loss, parameters, batch))
    vmapped = torch.func.vmap(gradient, (None, 0, 0, 0, 0))(parameters, *batch)
    for i in range(3):
        single = loss.gradients(*(part[i] for part in batch), create_graph=True)
        close({name: p[i] for name, p in vmapped.items()}, single, rtol=1e-4, atol=1e-5)
        sum((single[name] * direction[name]).sum() / 3 for name in single).backward()
    forwards = torch.func.jvp(lambda parameters: gradient(parameters, *loss.batch), (parameters,), (direction,))[1]
    for name, p in parameters.items():
        assert 0 < forwards[name].norm() and (p.grad - forwards[name]).norm() < 1e-4 * forwards[name].norm(), name


@pytest.mark.parametrize("block", FAMILIES)
def test_compiled_in_one_graph_results_are_those_of_eager(block):
    loss = Loss(block)
    images, labels, sigma, noise = loss.batch

    def results():
        with torch.no_grad():  # compiled before magnitudes sets its hooks
            denoised = loss.denoiser(images, 1.0, labels)
        rms = magnitudes(loss.denoiser, images, labels, sigma, noise)
        return denoised, rms, loss(*loss.batch), loss.gradients(*loss.batch)

    expected = results()
    for module in (loss.denoiser.net, loss):
        module.compile(backend="aot_eager", fullgraph=True)
    close(results(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductors_code_for_a_branch_gives_eagers_results():
    mlp, inputs = MPMLP(8, 16), [torch.randn(2, 4, 8), torch.randn(2, 1, 4), torch.randn(2, 1, 8)]
    values, parameters = [], [*mlp.parameters(), *(part.requires_grad_() for part in inputs)]

    def branch(x, theta, scale):
        return mp_sum(x, mlp(rotate(normalize(x) * (1 + scale), theta)), 0.3).pow(3).sum()

    for function in (branch, torch.compile(branch, fullgraph=True)):
        values.append((function(*inputs), *torch.autograd.grad(function(*inputs), parameters)))
    close(values[1], values[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", FAMILIES)
def test_in_bfloat16_the_network_stays_close_to_float32(block):
    net = awake(DiT(DiTConfig(**SMALL, block=block)))
    inputs = torch.randn(8, 3, 8, 8), torch.randn(8), torch.arange(8) % 6
    expected = net(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(*inputs)
    assert 0 < (out.float() - expected).norm() < 0.03 * expected.norm()


def test_parts_given_by_hand_are_the_family_they_are_of():
    config = DiTConfig(**SMALL, block="plain")
    torch.manual_seed(3)
    family = DiT(config)
    torch.manual_seed(3)
    by_hand = DiT(config, (PlainInput, PlainBlock, PlainOutput))
    close(by_hand.state_dict(), family.state_dict(), rtol=0, atol=0)
    assert not by_hand(torch.randn(2, 3, 8, 8), torch.randn(2), torch.arange(2)).any()
    assert by_hand.input.label.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("block", FAMILIES)
def test_a_denoiser_is_whole_after_load_state_dict(block):
    config = DiTConfig(**SMALL, block=block)
    good = awake(Denoiser(config))
    x, labels = torch.randn(2, 3, 8, 8), torch.arange(2)
    for assign in (False, True):
        with torch.device("meta"):
            empty = Denoiser(config)
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(good.state_dict(), assign=assign)
        assert torch.equal(empty(x, 1.0, labels), good(x, 1.0, labels))


def test_a_denoiser_takes_float64_and_edms_sigmas_but_no_half_weights():
    denoiser, x = awake(Denoiser(DiTConfig(**SMALL))), torch.randn(2, 3, 8, 8)
    for other in (denoiser(x.double(), 1.0), denoiser(x, torch.ones(2, 1, 1, 1))):
        assert torch.equal(other, denoiser(x, 1.0)) and other.dtype == torch.float32
    with pytest.raises(ValueError, match="weights must stay in float32"):
        denoiser.half()(x, 1.0)


def test_adaln_modulates_in_float32_when_the_network_is_in_bfloat16():
    block, x, cond = awake(DiT(DiTConfig(**SMALL, block="plain")).blocks[0]), torch.randn(2, 16, 32), torch.randn(2, 32)
    block.attention, block.mlp = nn.Identity(), nn.Identity()
    with torch.autocast("cpu", torch.bfloat16):
        values = block.modulation(cond).float()[:, None].chunk(6, dim=-1)
        out = block(x, cond)
    for scale, shift, gate in (values[:3], values[3:]):
        x = x + gate * (F.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift)
    close(out, x, rtol=1e-5, atol=1e-5)
