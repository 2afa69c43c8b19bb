import dataclasses
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import mp_weights, normalize_weights
from model import SIZES, Denoiser, DiT, DiTConfig, edm2_loss, magnitudes, position_embedding

SMALL = dict(depth=3, width=32, heads=2, patch=2, image_size=8, channels=3, num_classes=5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def awake(model):
    """The model with its zero-initialised gains and layers set to something, so that every part acts."""
    with torch.no_grad():
        for p in model.parameters():
            if (p == 0).all():
                p.normal_(std=0.3)
    return model


def block_rms(config, x):
    """Mean token RMS after every block for unit noise in."""
    net, rms = DiT(config).eval(), []
    for block in net.blocks:
        block.register_forward_hook(lambda block, inputs, tokens: rms.append(tokens.square().mean(-1).sqrt().mean().item()))
    with torch.no_grad():
        net(x, torch.randn(len(x)), torch.randint(10, (len(x),)))
    return rms


@pytest.mark.parametrize("size", ["S", "B"])
@pytest.mark.parametrize("grid", [4, 16])
def test_28_magnitude_preserving_blocks_keep_token_rms_near_1_at_initialisation(size, grid):
    config = DiTConfig(size=size, depth=28, patch=2, image_size=2 * grid, channels=4, num_classes=10)
    rms = block_rms(config, torch.randn(4, 4, 2 * grid, 2 * grid))
    assert len(rms) == 28 and 0.75 < min(rms) and max(rms) < 1.25


def test_28_plain_blocks_with_modulation_of_unit_size_do_not():
    config = DiTConfig(block="plain", depth=28, width=96, heads=3, image_size=8, channels=4, num_classes=10)
    net, rms, x, cond = DiT(config), [], torch.randn(4, 16, 96), torch.randn(4, 96)
    for block in net.blocks:
        nn.init.normal_(block.modulation.weight, std=96**-0.5)
        x = block(x, cond)
        rms.append(x.square().mean().sqrt().item())
    assert max(rms) > 3


@pytest.mark.parametrize("size, parameters", [("S", 33e6), ("B", 130e6)])
def test_plain_sizes_have_the_published_parameter_counts(size, parameters):
    """DiT, Table 4: S has 33 million, B 130 million parameters."""
    with torch.device("meta"):
        net = DiT(DiTConfig(block="plain", size=size, patch=4, image_size=32, channels=4, num_classes=1000))
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(parameters, rel=0.02)


def test_rotation_instead_of_shift_saves_5_percent_of_the_parameters():
    def count(modulation):
        with torch.device("meta"):
            net = DiT(DiTConfig(size="S", patch=4, image_size=16, channels=4, num_classes=1000, modulation=modulation))
        return sum(p.numel() for p in net.parameters())

    saved = 1 - count(("rotate", "scale", "gate")) / count(("scale", "shift", "gate"))
    assert 0.052 < saved < 0.058


@pytest.mark.parametrize("block", ["mp", "plain"])
@pytest.mark.parametrize("patch, channels, num_classes", [(1, 1, 10), (2, 3, 0), (4, 4, 1000), (8, 8, 3)])
def test_output_is_zero_at_initialisation_and_every_parameter_gets_a_gradient(block, patch, channels, num_classes):
    config = DiTConfig(**SMALL | dict(block=block, patch=patch, channels=channels, num_classes=num_classes))
    net, x = DiT(config), torch.randn(2, channels, 8, 8)
    labels = torch.tensor([0, num_classes])
    assert net(x, torch.zeros(2), labels).shape == x.shape
    assert (net(x, torch.zeros(2), labels) == 0).all()
    awake(net)(x, torch.randn(2), labels).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_patches_are_cut_and_put_back_in_place():
    """With the middle and the linears out of the way, each output pixel depends on the pixels of its own patch alone."""
    config = DiTConfig(**SMALL)
    net = awake(DiT(config)).eval()
    net.middle = lambda x, cond: x
    x = torch.randn(1, 3, 8, 8)
    y = x.clone()
    y[0, 1, 2, 5] += 1
    changed = (net(x, torch.zeros(1), torch.zeros(1, dtype=torch.long)) - net(y, torch.zeros(1), torch.zeros(1, dtype=torch.long))) != 0
    expected = torch.zeros_like(changed)
    expected[0, :, 2:4, 4:6] = True
    assert torch.equal(changed, expected)


def test_mp_block_is_the_papers_equations():
    net = awake(DiT(DiTConfig(**SMALL))).eval()
    block, x, cond = net.blocks[0], torch.randn(2, 16, 32), torch.randn(2, 32)

    def modulated(m, branch, x):
        values = F.linear(cond, F.normalize(m.linear.weight, dim=1))[:, None]
        theta, s, g = values[..., :16] * m.gain[0], values[..., 16:48] * m.gain[1], values[..., 48:] * m.gain[2]
        z = torch.complex(x[..., :16], x[..., 16:]) * torch.exp(1j * theta)
        return (1 + g) * branch(torch.cat([z.real, z.imag], dim=-1) * (1 + s))

    h = (0.7 * x + 0.3 * modulated(block.modulate1, block.attention, x)) / 0.58**0.5
    h = (0.7 * h + 0.3 * modulated(block.modulate2, block.mlp, h)) / 0.58**0.5
    torch.testing.assert_close(block(x, cond), h, rtol=1e-4, atol=1e-4)


def test_plain_attention_is_multihead_attention():
    attention = awake(DiT(DiTConfig(**SMALL | dict(block="plain")))).blocks[0].attention
    reference = nn.MultiheadAttention(32, 2, batch_first=True)
    reference.load_state_dict({"in_proj_weight": attention.qkv.weight, "in_proj_bias": attention.qkv.bias,
                               "out_proj.weight": attention.out.weight, "out_proj.bias": attention.out.bias})
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(attention(x), reference(x, x, x)[0], rtol=1e-4, atol=1e-5)


def test_plain_blocks_start_as_the_identity():
    net, x = DiT(DiTConfig(**SMALL | dict(block="plain"))), torch.randn(2, 16, 32)
    assert torch.equal(net.middle(x, torch.randn(2, 32)), x)


def test_position_embedding_tells_rows_from_columns_and_every_token_from_every_other():
    position = position_embedding(64, 16)
    torch.testing.assert_close(position.square().mean(-1), torch.full((256,), 0.5))
    assert torch.cdist(position, position).fill_diagonal_(9).min() > 0.1
    grid = position.view(16, 16, 64)
    assert torch.equal(grid[3, :, :32], grid[3, :1, :32].expand(16, 32))      # one half: the row
    assert torch.equal(grid[:, 3, 32:], grid[:1, 3, 32:].expand(16, 32))      # the other: the column


@pytest.mark.parametrize("block", ["mp", "plain"])
def test_denoiser_returns_clean_images_as_sigma_goes_to_0(block):
    denoiser, x = awake(Denoiser(DiTConfig(**SMALL | dict(block=block)))).eval(), torch.randn(2, 3, 8, 8) * 0.5
    torch.testing.assert_close(denoiser(x, 1e-6, torch.tensor([1, 2])), x, rtol=0, atol=1e-4)


def test_preconditioning_feeds_and_asks_for_unit_variance():
    """[EDM, appendix B.6]: with F = 0 the error of D is c_out times the target F should have had: RMS 1."""
    denoiser = Denoiser(DiTConfig(**SMALL))
    seen = []
    denoiser.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs))
    for sigma in (0.01, 0.5, 3.0, 80.0):
        y = torch.randn(200, 3, 8, 8) * 0.5
        x = y + sigma * torch.randn_like(y)
        error = y - denoiser(x, sigma)                       # the output layer starts at zero, so D = c_skip·x
        c_out = sigma * 0.5 / (sigma**2 + 0.25) ** 0.5
        assert (error / c_out).square().mean().sqrt().item() == pytest.approx(1, rel=0.02)
        scaled, c_noise, labels = seen[-1]
        assert scaled.square().mean().sqrt().item() == pytest.approx(1, rel=0.02)
        torch.testing.assert_close(c_noise, torch.full((200,), sigma).log() / 4)
        assert (labels == 5).all()                           # None means the null label
    loss_weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    assert loss_weight * c_out**2 == pytest.approx(1)        # lambda(sigma)·c_out² = 1


def test_denoiser_depends_on_the_label_and_none_is_the_null_label():
    denoiser, x = awake(Denoiser(DiTConfig(**SMALL))).eval(), torch.randn(2, 3, 8, 8)
    null = denoiser(x, 1.0, torch.tensor([5, 5]))
    assert torch.equal(denoiser(x, torch.ones(2), None), null)
    assert not torch.allclose(denoiser(x, 1.0, torch.tensor([0, 1])), null, atol=1e-4)


def test_uncertainty_is_one_linear_over_fourier_features_of_c_noise():
    denoiser, sigma = Denoiser(DiTConfig(**SMALL)), torch.tensor([0.1, 1.0, 10.0])
    features = denoiser.u_fourier(sigma.log() / 4)
    expected = features @ denoiser.u_linear.weight[0] / denoiser.u_linear.weight[0].norm()
    torch.testing.assert_close(denoiser.uncertainty(sigma), expected, rtol=1e-4, atol=1e-4)


def test_loss_is_the_weighted_error_over_exp_u_plus_u():
    torch.manual_seed(0)
    y, noise, sigma, labels = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.rand(4) + 0.1, torch.zeros(4)
    loss = edm2_loss(lambda x, s, c: 0.3 * x, lambda s: s * 2, y, labels, sigma, noise)
    expected = 0
    for i in range(4):
        s = sigma[i].item()
        weight = (s**2 + 0.25) / (s * 0.5) ** 2
        error = 0.3 * (y[i] + s * noise[i]) - y[i]
        expected += (weight / math.exp(2 * s) * error.square().mean().item() + 2 * s) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_loss_is_least_over_u_where_exp_u_is_the_weighted_error():
    y, noise, sigma = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8), torch.ones(1)
    u = torch.zeros(1, requires_grad=True)
    for _ in range(200):
        grad, = torch.autograd.grad(edm2_loss(lambda x, s, c: 0 * x, lambda s: u, y, None, sigma, noise), u)
        u.data -= 0.3 * grad
    assert u.exp().item() == pytest.approx(5 * y.square().mean().item(), rel=1e-3)     # lambda(1) = 5


def test_averaged_weights_act_the_same_before_and_after_they_are_normalised():
    denoiser, x = awake(Denoiser(DiTConfig(**SMALL))).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for w in mp_weights(denoiser):
            w.mul_(0.6)
    before = denoiser(x, 1.0)
    normalize_weights(mp_weights(denoiser))
    torch.testing.assert_close(denoiser(x, 1.0), before, rtol=1e-4, atol=1e-5)


def test_middle_is_the_seam_for_variants():
    class Twice(DiT):
        def middle(self, x, cond):
            return super().middle(super().middle(x, cond), cond)

    net = awake(Twice(DiTConfig(**SMALL)))
    assert net(torch.randn(2, 3, 8, 8), torch.zeros(2), torch.tensor([0, 5])).shape == (2, 3, 8, 8)


def test_magnitudes_reports_what_hooks_would_see_and_leaves_none_behind():
    denoiser = Denoiser(DiTConfig(**SMALL))
    values = magnitudes(denoiser, torch.randn(4, 3, 8, 8), torch.ones(4), torch.zeros(4, dtype=torch.long))
    assert list(values) == ["token_rms_first", "token_rms_middle", "token_rms_last", "weight_rms"]
    assert values["weight_rms"] == pytest.approx(1, abs=1e-4) and 0.5 < values["token_rms_last"] < 1.5
    assert not any(block._forward_hooks for block in denoiser.net.blocks)


def test_sizes_by_name_and_explicit_values_win():
    for size, (depth, width, heads) in SIZES.items():
        config = DiTConfig(size=size)
        assert (config.depth, config.width, config.heads) == (depth, width, heads)
    config = DiTConfig(size="B", depth=2)
    assert (config.depth, config.width) == (2, 768)
    assert DiTConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize("wrong", [dict(width=100, heads=3), dict(patch=3, image_size=8), dict(modulation=("turn",)),
                                   dict(modulation=()), dict(block="x"), dict(size="XXL"), dict(label_dropout=1.5),
                                   dict(depth=-1), dict(width=6, heads=1)])
def test_impossible_configurations_are_refused_by_the_name_of_the_key(wrong):
    with pytest.raises(ValueError, match=f"^({'|'.join(wrong)}): "):
        DiTConfig(**wrong)


def test_network_compiles_in_one_graph():
    net, x = awake(DiT(DiTConfig(**SMALL))), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    out = compiled(x, torch.zeros(2), torch.tensor([0, 5]))
    torch.testing.assert_close(out, net(x, torch.zeros(2), torch.tensor([0, 5])), rtol=1e-4, atol=1e-5)
    out.sum().backward()


@pytest.mark.parametrize("block", ["mp", "plain"])
def test_network_in_bfloat16_stays_close_to_float32(block):
    net, x = awake(DiT(DiTConfig(**SMALL | dict(block=block)))), torch.randn(8, 3, 8, 8)
    c_noise, labels = torch.randn(8), torch.arange(8) % 6
    expected = net(x, c_noise, labels)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, c_noise, labels)
    assert (out.float() - expected).norm() < 0.03 * expected.norm()
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())
