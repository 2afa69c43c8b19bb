"""The layers against their closed forms, and each definition pasted into an empty file."""

import ast
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import layers
from helpers import close, rms, turned
from layers import (MPMLP, MPAttention, MPEmbedding, MPFourier, MPLinear, Modulation, force_weight_normalization,
                    mp_cat, mp_silu, mp_sum, normalize, rotate)


def test_normalize_divides_by_the_rms_at_any_scale():
    x = torch.randn(50, 64) * torch.logspace(-6, 4, 50)[:, None]
    close(normalize(x).double(), x.double() / rms(x.double())[:, None].clamp(min=1e-4))
    close(normalize(x.bfloat16()), normalize(x.bfloat16().float()).bfloat16(), rtol=2**-7, atol=0)
    assert not normalize(torch.zeros(3, 8)).any() and not normalize(torch.zeros(3, 8).half()).any()


def test_mp_silu_keeps_unit_magnitude():
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    density = torch.exp(-x**2 / 2) / math.sqrt(2 * math.pi)
    assert abs(torch.trapezoid(mp_silu(x) ** 2 * density, x).sqrt() - 1) < 1e-3


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_mp_sum_and_mp_cat_keep_rms_1_and_give_b_the_share_t(t):
    a, b, c = normalize(torch.randn(4000, 100)), normalize(torch.randn(4000, 300)), torch.randn(4000, 100)
    both = mp_sum(a, c, t)
    close(rms(both.flatten()), torch.tensor(1.0), rtol=0.01, atol=0)
    close((both * c).mean() * (1 - t), (both * a).mean() * t, rtol=0, atol=0.01)
    for share in (t, torch.full((4000, 1), t)):
        both = mp_cat(a, b, share)
        close(rms(both), torch.ones(4000))
        close(both[:, 100:].norm(dim=1) * (1 - t), both[:, :100].norm(dim=1) * t)


@pytest.mark.parametrize("shape", [(3, 1, 4), (3, 5, 4), (4,)])
def test_rotate_multiplies_by_unit_complex_numbers(shape):
    x, theta = torch.randn(3, 5, 8), torch.randn(shape) * 10
    close(rotate(x, theta), turned(x, theta))
    close(rotate(x, theta).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), theta).dtype == torch.bfloat16


def test_what_does_not_fit_is_a_value_error():
    for function, said in ((lambda: rotate(torch.ones(3, 7), torch.ones(3)), "7 channels need 3.5 angles, not 3"),
                           (lambda: rotate(torch.ones(3, 8), torch.ones(8)), "8 channels need 4 angles, not 8"),
                           (lambda: MPAttention(10, 3), "heads: 3 do not divide a width of 10"),
                           (lambda: Modulation(8, ("scale", "turn")), "kinds: must be some of scale, shift, rotate"),
                           (lambda: Modulation(8, "scale"), "kinds: ")):
        with pytest.raises(ValueError, match=said):
            function()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_act_with_length_1_in_half_precision_and_zeros_as_zeros(dtype):
    wide, x = MPLinear(65536, 2).to(dtype), torch.eye(4, 65536)[:, :65536].to(dtype)
    close(wide.unit_rows().float().norm(dim=1), torch.ones(2), rtol=0.01, atol=0)
    assert wide(x).isfinite().all()
    small = MPLinear(8, 3)
    small.weight.data[0] = 0
    small.weight.data[1] *= 1e-4
    for layer in (small, small.to(dtype)):
        close(layer.unit_rows().float().norm(dim=1), torch.tensor([0.0, 1, 1]), rtol=0.01, atol=0)


def test_fourier_features_follow_their_formula_at_rms_1():
    fourier = MPFourier(4096)
    close(rms(fourier(torch.linspace(-2, 2, 9))), torch.ones(9), rtol=0.05, atol=0)
    f, phi = fourier.freqs / (2 * math.pi), fourier.phases / (2 * math.pi)
    close(fourier(torch.tensor([0.7]))[0], 2**0.5 * torch.cos(2 * math.pi * (f * 0.7 + phi)), rtol=1e-4, atol=1e-4)
    assert abs(f.std() - 1) < 0.05 and 0 <= phi.min() and phi.max() <= 1 and abs(phi.var() - 1 / 12) < 0.005


@pytest.mark.parametrize("fan_in, fan_out", [(64, 256), (256, 64)])
def test_linear_acts_by_the_directions_of_its_rows_at_rms_1(fan_in, fan_out):
    linear, x = MPLinear(fan_in, fan_out), torch.randn(2000, fan_in)
    y = linear(x)
    close(rms(linear.weight), torch.ones(fan_out))
    close(rms(y.flatten()), torch.tensor(1.0), rtol=0.02, atol=0)
    linear.weight.data *= torch.rand(fan_out, 1) * 10
    close(y, x @ F.normalize(linear.weight, dim=1).T, rtol=1e-4, atol=1e-5)
    close(linear.eval()(x), y, rtol=1e-4, atol=1e-5)  # in every mode


def test_a_step_lengthens_rows_and_forcing_undoes_it():
    model, x = torch.nn.Sequential(MPLinear(32, 16), MPEmbedding(5, 16), torch.nn.Linear(3, 3)), torch.randn(10, 32)
    w, table, other = (module.weight for module in model)
    gradient, = torch.autograd.grad(model[0](x).pow(4).sum(), w)
    close((gradient * w).sum(1), torch.zeros(16), rtol=0, atol=1e-4)
    for p in (w, table, other):
        p.data *= 3
    close(torch.autograd.grad(model[0](x).pow(4).sum(), w)[0], gradient / 3)  # longer rows learn less
    w.data -= gradient
    close(w.square().sum(1), 9 * 32 + gradient.square().sum(1))  # Pythagoras
    assert w.norm(dim=1).min() > 3 * 32**0.5
    direction, output, kept = F.normalize(w, dim=1), model[0](x), other.clone()
    force_weight_normalization(model)
    close((rms(w), rms(table)), (torch.ones(16), torch.ones(5)))
    close((F.normalize(w, dim=1), model[0](x), other), (direction, output, kept))


def test_embedding_gives_the_row_of_its_label_at_rms_1():
    embedding, labels = MPEmbedding(11, 64), torch.tensor([10, 0, 3, 3])
    embedding.weight.data *= 7
    close(embedding(labels), 8 * F.normalize(embedding.weight[labels], dim=1))


def test_attention_is_softmax_of_bounded_cosines():
    layer, x = MPAttention(16, 2), torch.randn(3, 5, 16) * 100
    heads = (x @ F.normalize(layer.qkv.weight, dim=1).T).view(3, 5, 3, 2, 8).permute(2, 3, 0, 1, 4)
    q, k, v = F.normalize(heads, dim=-1) * math.sqrt(8)  # (2, 3, 5, 8)
    logits = q @ k.transpose(-1, -2) / math.sqrt(8)
    assert logits.abs().max() <= math.sqrt(8) + 1e-4
    both = torch.cat(list(logits.softmax(-1) @ v), dim=-1)
    close(layer(x), both @ F.normalize(layer.out.weight, dim=1).T, rtol=1e-4, atol=1e-5)


def test_mlp_is_two_linears_around_mp_silu_at_rms_1():
    mlp, x = MPMLP(128, 512), torch.randn(500, 128)
    hidden = mp_silu(x @ F.normalize(mlp.up.weight, dim=1).T)
    close(mlp(x), hidden @ F.normalize(mlp.down.weight, dim=1).T, rtol=1e-4, atol=1e-5)
    close(rms(mlp(x).flatten()), torch.tensor(1.0), rtol=0.1, atol=0)


@pytest.mark.parametrize("kinds", [c for n in range(4) for c in itertools.combinations(Modulation.KINDS, n)])
def test_every_subset_of_modulations_scales_shifts_then_rotates(kinds):
    modulation, x, cond = Modulation(8, kinds[::-1]), torch.randn(2, 3, 8), torch.randn(2, 8)
    assert torch.equal(modulation(x, cond), x)  # whatever the conditioning, at first
    expected = x
    if kinds:
        rows = F.normalize(modulation.linear.weight, dim=1).split([4 if kind == "rotate" else 8 for kind in kinds])
        gains = (0.5, -0.7, 0.3)[:len(kinds)]
        modulation.gain.data = torch.tensor(gains)
        values = {kind: gain * (cond @ row.T)[:, None] for kind, gain, row in zip(kinds, gains, rows)}
        expected = x * (1 + values.get("scale", 0)) + values.get("shift", 0)
        expected = turned(expected, values.get("rotate", torch.zeros(4)))
    close(modulation(x, cond), expected)
    if kinds == ("scale",):
        with torch.autocast("cpu", torch.bfloat16):
            scale = 0.5 * modulation.linear(cond).float()[:, None]
            close(modulation(x, cond), x * (1 + scale), rtol=0, atol=1e-6)  # not rounded once more


def test_every_definition_works_pasted_with_two_others_at_most():
    """Nothing else stands at the top level but imports, so that nothing else can be missing."""
    _, *nodes = ast.parse(Path(layers.__file__).read_text()).body
    assert {type(node) for node in nodes} <= {ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef}
    definitions = {node.name: node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    uses = {name: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & definitions.keys() - {name}
            for name, node in definitions.items()}
    for name, node in definitions.items():
        assert uses[name] <= set(re.findall(r"\w+", ast.get_docstring(node))), name
        needs = uses[name].union(*(uses[other] for other in uses[name]))
        assert needs == needs.union(*(uses[other] for other in needs))
        assert len(needs) <= (3 if name in ("MPAttention", "force_weight_normalization") else 2), name
