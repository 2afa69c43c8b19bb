import ast
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import layers
from layers import (MPMLP, Modulation, MPAttention, MPEmbedding, MPFourier, MPLinear, force_weight_normalization, mp_cat,
                    mp_silu, mp_sum, mp_weights, normalize, normalize_weights, project_gradients, rotate)


def rms(x):
    return x.square().mean(-1).sqrt()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_normalize_gives_rms_1_at_any_scale_and_leaves_zero_alone():
    x = torch.randn(50, 64) * torch.logspace(-2, 4, 50)[:, None]
    torch.testing.assert_close(rms(normalize(x)), torch.ones(50), rtol=1e-4, atol=0)
    assert (normalize(torch.zeros(3, 8)) == 0).all()
    assert normalize(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-7])
def test_normalize_gradient_is_the_derivative(scale):
    x = (torch.randn(5, 6) * scale).requires_grad_()
    grad = torch.randn(5, 6)
    reference = x * (x.square().mean(-1, keepdim=True) + 1e-8).rsqrt()
    expected, = torch.autograd.grad(reference, x, grad)
    actual, = torch.autograd.grad(normalize(x), x, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_mp_silu_keeps_unit_magnitude():
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    density = torch.exp(-x**2 / 2) / math.sqrt(2 * math.pi)
    second_moment = torch.trapezoid(mp_silu(x) ** 2 * density, x)
    assert abs(second_moment.sqrt() - 1) < 1e-3


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_mp_sum_and_mp_cat_keep_unit_magnitude_and_the_ratio_t(t):
    a, b = normalize(torch.randn(4000, 100)), normalize(torch.randn(4000, 300))
    c = torch.randn(4000, 100)
    torch.testing.assert_close(rms(mp_sum(a, c, t).flatten()), torch.tensor(1.0), rtol=0.01, atol=0)
    both = mp_cat(a, b, t)
    assert both.shape == (4000, 400)
    torch.testing.assert_close(rms(both), torch.ones(4000), rtol=1e-4, atol=0)
    share_a, share_b = both[:, :100].norm(dim=1), both[:, 100:].norm(dim=1)
    torch.testing.assert_close(share_b * (1 - t), share_a * t, rtol=1e-4, atol=1e-4)


def test_rotate_is_complex_multiplication_by_a_unit_number():
    x, theta = torch.randn(3, 5, 8), torch.randn(3, 1, 4) * 10
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * theta)
    torch.testing.assert_close(rotate(x, theta), torch.cat([z.real, z.imag], dim=-1))


def test_rotate_keeps_every_norm_and_is_undone_by_the_opposite_angle():
    x, theta = torch.randn(4, 16, 96), torch.randn(4, 1, 48) * 100
    y = rotate(x, theta)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rotate(y, -theta), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(rotate(x, torch.zeros(4, 1, 48)), x)


@pytest.mark.parametrize("x_shape, theta_shape", [((3, 5, 8), (3, 1, 4)), ((3, 1, 8), (3, 5, 4)), ((8,), (4,))])
def test_rotate_gradient_is_the_derivative(x_shape, theta_shape):
    x, theta = torch.randn(x_shape, requires_grad=True), torch.randn(theta_shape, requires_grad=True)
    a, b = x.chunk(2, dim=-1)
    reference = torch.cat([a * theta.cos() - b * theta.sin(), a * theta.sin() + b * theta.cos()], dim=-1)
    grad = torch.randn_like(reference)
    expected = torch.autograd.grad(reference, (x, theta), grad)
    actual = torch.autograd.grad(rotate(x, theta), (x, theta), grad)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_fourier_features_have_unit_magnitude_and_follow_their_formula():
    fourier = MPFourier(4096)
    c_noise = torch.linspace(-2, 2, 9)
    torch.testing.assert_close(rms(fourier(c_noise)), torch.ones(9), rtol=0.05, atol=0)
    f, phi = fourier.freqs / (2 * math.pi), fourier.phases / (2 * math.pi)
    assert abs(f.std() - 1) < 0.05 and 0 <= phi.min() and phi.max() <= 1
    expected = math.sqrt(2) * torch.cos(2 * math.pi * (f * 0.7 + phi))
    torch.testing.assert_close(fourier(torch.tensor([0.7]))[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fan_in, fan_out", [(64, 256), (256, 64)])
def test_linear_keeps_unit_magnitude_whatever_the_length_of_its_stored_rows(fan_in, fan_out):
    linear, x = MPLinear(fan_in, fan_out), torch.randn(2000, fan_in)
    torch.testing.assert_close(rms(linear.weight), torch.ones(fan_out), rtol=1e-5, atol=0)
    y = linear(x)
    torch.testing.assert_close(rms(y.flatten()), torch.tensor(1.0), rtol=0.02, atol=0)
    torch.testing.assert_close(y, x @ (linear.weight / linear.weight.norm(dim=1, keepdim=True)).T, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(fan_out, 1) * 10)
    for training in (True, False):
        torch.testing.assert_close(linear.train(training)(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear(x, gain=3.0), 3 * y, rtol=1e-4, atol=1e-5)


def test_forced_linear_takes_the_same_step_as_one_that_normalises_in_its_forward_pass():
    model, x, target = MPLinear(32, 16), torch.randn(10, 32), torch.randn(10, 16)
    (model(x) - target).square().sum().backward()
    expected, output = model.weight.grad.clone(), model(x)
    model.weight.grad = None
    weights = force_weight_normalization(model)
    torch.testing.assert_close(model(x), output)
    (model(x) - target).square().sum().backward()
    assert (model.weight.grad - expected).abs().max() > 0.01      # until the part along each row is removed
    project_gradients(weights)
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((model.weight.grad * model.weight).sum(1), torch.zeros(16), rtol=0, atol=1e-3)


def test_normalize_weights_puts_every_row_back_to_rms_1_in_its_direction():
    model = torch.nn.Sequential(MPLinear(32, 16), MPEmbedding(5, 16), torch.nn.Linear(3, 3))
    weights = mp_weights(model)
    assert [w.shape for w in weights] == [(16, 32), (5, 16)]
    before = [F.normalize(w, dim=1) for w in weights]
    with torch.no_grad():
        for w in weights:
            w.mul_(torch.rand(len(w), 1) + 0.1)
    normalize_weights(weights)
    for w, direction in zip(weights, before):
        torch.testing.assert_close(rms(w), torch.ones(len(w)), rtol=1e-6, atol=0)
        torch.testing.assert_close(F.normalize(w, dim=1), direction)


def test_embedding_rows_have_unit_magnitude():
    embedding = MPEmbedding(11, 64)
    with torch.no_grad():
        embedding.weight.mul_(7)
    torch.testing.assert_close(rms(embedding(torch.arange(11))), torch.ones(11), rtol=1e-5, atol=0)


def test_attention_is_softmax_of_cosines_and_its_logits_are_bounded():
    attention, x = MPAttention(16, 2).eval(), torch.randn(3, 5, 16) * 100
    q, k, v = F.linear(x, F.normalize(attention.qkv.weight, dim=1)).chunk(3, dim=-1)
    heads = []
    for h in range(2):
        qh, kh, vh = (F.normalize(t[..., 8 * h:8 * h + 8], dim=-1) * math.sqrt(8) for t in (q, k, v))
        logits = qh @ kh.transpose(1, 2) / math.sqrt(8)
        assert logits.abs().max() <= math.sqrt(8) + 1e-4
        heads.append(logits.softmax(-1) @ vh)
    expected = F.linear(torch.cat(heads, dim=-1), F.normalize(attention.out.weight, dim=1))
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_mlp_is_two_linears_around_mp_silu_and_keeps_unit_magnitude():
    mlp, x = MPMLP(128, 512), torch.randn(500, 128)
    torch.testing.assert_close(mlp(x), mlp.down(mp_silu(mlp.up(x))), rtol=1e-4, atol=1e-5)
    assert 0.9 < rms(mlp(x).flatten()) < 1.1


@pytest.mark.parametrize("kinds", [c for n in range(5) for c in itertools.combinations(Modulation.KINDS, n)])
def test_every_subset_of_modulations_starts_as_nothing_and_then_does_what_it_says(kinds):
    modulation, x, cond = Modulation(8, kinds), torch.randn(2, 3, 8), torch.randn(2, 8)
    branch = MPLinear(8, 8)
    torch.testing.assert_close(modulation(x, cond, branch), branch(x))
    if not kinds:
        return
    with torch.no_grad():
        modulation.gain.copy_(torch.tensor([0.5, -0.7, 0.3, 0.9])[:len(kinds)])
    sizes = [4 if kind == "rotate" else 8 for kind in kinds]
    values = dict(zip(kinds, modulation.linear(cond)[:, None].split(sizes, dim=-1)))
    value = {kind: gain * values[kind] for kind, gain in zip(kinds, modulation.gain)}
    y = x
    if "rotate" in value:
        y = rotate(y, value["rotate"])
    y = branch(y * (1 + value.get("scale", 0)) + value.get("shift", 0)) * (1 + value.get("gate", 0))
    torch.testing.assert_close(modulation(x, cond, branch), y)
    assert not torch.allclose(y, branch(x))


def test_rotation_takes_half_the_weights_of_a_scale():
    assert 2 * Modulation(64, ("rotate",)).linear.weight.numel() == Modulation(64, ("scale",)).linear.weight.numel()


def test_every_definition_works_pasted_alone_with_at_most_two_others():
    """A definition is a function or class, with the alias line `name = Class.apply` that may follow it."""
    tree = ast.parse(Path(layers.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    blocks = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            blocks.append([node])
        elif isinstance(node, ast.Assign):
            blocks[-1].append(node)
    owner = {}
    for block in blocks:
        for node in block:
            owner[node.name if hasattr(node, "name") else node.targets[0].id] = blocks.index(block)

    def needs(index, found):
        for node in itertools.chain.from_iterable(map(ast.walk, blocks[index])):
            other = owner.get(node.id) if isinstance(node, ast.Name) else None
            if other is not None and other not in found:
                found.add(other)
                needs(other, found)
        return found

    used = {"normalize": (torch.randn(2, 4),), "rotate": (torch.randn(2, 4), torch.randn(2, 2)), "MPLinear": (4, 4),
            "MPAttention": (4, 2), "MPMLP": (4, 8), "MPEmbedding": (3, 4), "MPFourier": (4,), "mp_silu": (torch.randn(3),),
            "mp_sum": (torch.randn(3), torch.randn(3), 0.3), "mp_cat": (torch.randn(3), torch.randn(3)),
            "Modulation": (4, ("rotate", "gate"))}
    assert set(used) <= set(owner)
    for name, arguments in used.items():
        wanted = needs(owner[name], {owner[name]})
        assert len(wanted) <= 3, f"{name} needs {len(wanted) - 1} other definitions"
        body = imports + [node for i in sorted(wanted) for node in blocks[i]]
        space = {}
        exec(compile(ast.Module(body, type_ignores=[]), "pasted", "exec"), space)
        made = space[name](*arguments)
        if name in ("MPLinear", "MPAttention", "MPMLP"):
            made(torch.randn(2, 3, 4))
        if name == "Modulation":
            made(torch.randn(2, 3, 4), torch.randn(2, 4), lambda x, gain: x * gain)
