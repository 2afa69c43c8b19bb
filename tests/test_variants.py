"""Each variant against what it is a diff of, its equations computed another way, and the commands with its name."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, call
from data import load_dataset, to_network
from layers import force_weight_normalization
from model import Denoiser, DiT, DiTConfig, config_class, position_embedding
from sample import load_denoiser
from test_end_to_end import TINY, done, log
from test_model import awake
from test_resume import same_run
from train import TrainConfig, build, optimizer_step
from variants import ddae, ladder, mup, scalelong

SMALL = dict(depth=3, width=32, heads=2, patch=2, image_size=8, channels=1, num_classes=10)
INPUT = (torch.randn(4, 1, 8, 8), torch.randn(4), torch.tensor([0, 3, 9, 10]))
FAMILIES = ("mp", "plain")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the ladder ----

def test_the_ends_of_the_ladder_are_the_two_families():
    mp = awake(DiT(DiTConfig(**SMALL, modulation=("scale", "shift", "gate"))))
    top = ladder.Config(**SMALL, rung="I").network()
    top.load_state_dict(mp.state_dict())
    assert torch.equal(top(*INPUT), mp(*INPUT))

    plain, weights = awake(DiT(DiTConfig(**SMALL, block="plain"))), {}
    for name, weight in plain.state_dict().items():
        for old, new in (("mlp.0", "mlp.up"), ("mlp.2", "mlp.down"), ("noise.2", "noise.1"), ("output.modulation", "output.modulate.linear")):
            name = name.replace(old, new)
        parts = zip(("modulate1", "modulate2"), weight.chunk(2)) if "modulation" in name else [("", weight)]
        weights |= {name.replace("modulation", f"{part}.linear"): rows for part, rows in parts}
    bottom = ladder.Config(**SMALL, rung="A").network()
    bottom.load_state_dict(weights)
    torch.testing.assert_close(bottom(*INPUT), plain(*INPUT), rtol=1e-5, atol=1e-5)
    fresh, start = ladder.Config(**SMALL, rung="A").network().state_dict(), DiT(DiTConfig(**SMALL, block="plain")).state_dict()
    assert fresh["blocks.0.mlp.up.weight"].std() == pytest.approx(start["blocks.0.mlp.0.weight"].std().item(), rel=0.05)
    assert fresh["input.noise.1.weight"].std() == pytest.approx(0.02, rel=0.1) and fresh["input.label.weight"].std() == pytest.approx(0.02, rel=0.2)
    assert not any(weight.any() for name, weight in fresh.items() if "modulate" in name or "output.linear" in name)


@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_every_rung_starts_at_zero_learns_and_keeps_the_weights_it_promises(rung):
    config = TrainConfig(model=ladder.Config(**SMALL, rung=rung))
    denoiser, _, optimizer = build(config, torch.device("cpu"))
    assert not denoiser.net(*INPUT).any()
    weights = force_weight_normalization(denoiser)
    for _ in range(4):
        optimizer.zero_grad()
        (denoiser(INPUT[0], 1.0, INPUT[2]).square().mean() + denoiser.uncertainty(torch.ones(1)).square().mean()).backward()
        optimizer_step(optimizer, weights, 0.01)
    assert denoiser.net(*INPUT).any()
    norms = [(name, p.square().mean(1)) for name, p in denoiser.net.named_parameters() if p.ndim == 2 and "label" not in name]
    unit = [name for name, squares in norms if (squares - 1).abs().max() < 1e-4]
    assert len(unit) == len(norms) if rung >= "D" else "output.linear.weight" not in unit


def test_each_rung_changes_the_network():
    nets = [awake(ladder.Config(**SMALL, rung=rung).network()) for rung in ladder.RUNGS]
    have = [[type(module).__name__ for module in net.modules()] for net in nets]
    for rung, net in zip(ladder.RUNGS, nets):
        names = {type(module).__name__ for module in net.blocks.modules()}
        assert ("LayerNorm" in names) == (rung < "G") and ("GELUMLP" in names) == (rung < "F") and ("PlainAttention" in names) == (rung < "B")
        assert net.input.position.square().mean().item() == pytest.approx(0.5 if rung < "H" else 1, rel=0.01)
    patches = torch.randn(2, 16, 4)
    for rung, net in zip(ladder.RUNGS, nets):
        x, position = net.input(patches, torch.zeros(2), torch.tensor([0, 1]))[0], position_embedding(32, 4)
        patch = net.input.patch(torch.cat([patches, torch.ones(2, 16, 1)], dim=-1) if rung >= "C" else patches)
        torch.testing.assert_close(x, (patch + position * 2**0.5) * 0.5**0.5 if rung >= "H" else patch + position, rtol=1e-3, atol=1e-3)
    assert len({tuple(kinds) for kinds in have}) == 8                       # of the 9, only H keeps all modules: it changes how they join
    x, h = torch.randn(1, 16, 32), torch.randn(1, 16, 32)
    torch.testing.assert_close(nets[3].blocks[0].join(x, h), x + h)
    torch.testing.assert_close(nets[4].blocks[0].join(x, h), (0.7 * x + 0.3 * h) / 0.58**0.5)


# ---- long skips ----

@pytest.mark.parametrize("block", FAMILIES)
@pytest.mark.parametrize("scaling, shared, depth", [("none", True, 4), ("sqrt", True, 4), ("constant", True, 5), ("learned", True, 5), ("learned", False, 5)])
def test_long_skips_join_block_i_with_its_mirror_image(block, scaling, shared, depth):
    net = awake(scalelong.Config(**SMALL | dict(depth=depth, block=block), skip_scaling=scaling, kappa=0.6, skip_shared=shared).network())
    tokens, cond = torch.randn(3, 16, 32), torch.randn(3, 32)

    def joined(i, x, skip):
        if scaling == "learned":
            first, _, second, _ = net.scales[0 if shared else i].net
            s = torch.sigmoid(F.linear(F.linear(skip.mean(-1), first.weight, first.bias).relu(), second.weight, second.bias))[..., None]
        else:
            s = {"none": 1, "sqrt": 1 / math.sqrt(2), "constant": (1, 0.6)[i]}[scaling]
        if block == "plain":
            return net.joins[i](torch.cat([x, s * skip], dim=-1))
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        both = torch.cat([x, s * skip], dim=-1) / ((1 + torch.as_tensor(s) ** 2) / 2).sqrt()            # RMS 1 again, in the ratio 1 : s
        return F.linear(both, F.normalize(net.joins[i].weight, dim=1))

    def half(i, x):
        x = net.blocks[i](x, cond)
        return F.normalize(x, dim=-1) * math.sqrt(32) if block == "mp" else x

    a = half(0, tokens)
    b = half(1, a)
    x = net.blocks[2](b, cond) if depth == 5 else b
    x = net.blocks[depth - 2](joined(1, x, b), cond)
    x = net.blocks[depth - 1](joined(0, x, a), cond)
    torch.testing.assert_close(net.middle(tokens, cond), x, rtol=1e-3, atol=1e-4)


def test_learned_scales_are_shared_or_not():
    count = [sum(p.numel() for p in scalelong.Config(**SMALL | dict(depth=8), skip_scaling="learned", skip_shared=shared).network().parameters())
             for shared in (True, False)]
    assert count[1] - count[0] == 3 * (16 * 8 + 8 + 8 * 16 + 16)


def test_learned_scales_learn_at_a_plain_rate():
    rates = {block: scalelong.Config(**SMALL, block=block, skip_scaling="learned").network().rates for block in FAMILIES}
    assert len(rates["mp"]) == 4 and set(rates["mp"].values()) == {0.1} and not rates["plain"]


def test_learned_scales_see_the_image():
    for _ in range(10):
        scale = scalelong.LearnedScale(16)
        assert scale(torch.randn(50, 16, 64)).std(0).max() > 1e-4


@pytest.mark.parametrize("scaling", scalelong.SCALINGS)
def test_long_skips_keep_magnitudes_in_the_magnitude_preserving_network(scaling):
    """Token RMS after every block and join on noisy digits, over initialisations."""
    digits, found = load_dataset("digits"), []
    images = to_network(digits.images[:32], digits.stats)
    for _ in range(8):
        denoiser, rms = Denoiser(scalelong.Config(**SMALL | dict(depth=9, width=64), skip_scaling=scaling)), []
        for part in (*denoiser.net.blocks, *denoiser.net.joins):
            part.register_forward_hook(lambda part, inputs, x: rms.append(x.square().mean(-1).sqrt().mean().item()))
        with torch.no_grad():
            denoiser(images + 0.5 * torch.randn_like(images), 0.5)
        found.append(rms)
    found = np.mean(found, axis=0)
    assert len(found) == 9 + 4 and 0.9 < found.min() and found.max() < 1.1


# ---- self-conditioning ----

@pytest.mark.parametrize("block", FAMILIES)
def test_without_its_parts_ddae_is_the_core_and_with_them_later_blocks_are_told(block):
    core = awake(DiT(DiTConfig(**SMALL, block=block)))
    without = ddae.Config(**SMALL, block=block, self_conditioning=False).network()
    without.load_state_dict(core.state_dict())
    assert torch.equal(without(*INPUT), core(*INPUT)) and without.extra_loss(None, None, None) == 0.0

    net = ddae.Config(**SMALL, block=block, bottleneck=2).network()
    net.load_state_dict(core.state_dict(), strict=False)
    awake(net)
    x, cond = torch.randn(3, 16, 32), torch.randn(3, 32)
    middle = net.blocks[1](net.blocks[0](x, cond), cond)
    s = F.normalize(middle.mean(1), dim=-1) * math.sqrt(32)
    told = net.tell(s)
    told = (0.7 * cond + 0.3 * told) / math.sqrt(0.58) if block == "mp" else cond + told
    torch.testing.assert_close(net.middle(x, cond), net.blocks[2](middle, told), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.summary, s, rtol=1e-4, atol=1e-4)


def test_the_contrastive_loss_is_infonce_and_pulls_views_together():
    student, teacher = (awake(Denoiser(ddae.Config(**SMALL, contrast=0.5))) for _ in range(2))
    images, sigma = torch.randn(6, 1, 8, 8), torch.full((6,), 0.3)
    views = []
    teacher.register_forward_pre_hook(lambda teacher, inputs: views.append(inputs))
    student(images, sigma)
    ours = student.net.projector(student.net.summary).detach().double().numpy()
    loss = student.net.extra_loss(teacher.eval(), images, (0, 7, 0))
    (view, level), = views                                                  # without labels
    noise = [(view - ddae.moved(images, torch.Generator().manual_seed(0))).flatten(1), (view - images).flatten(1)]
    assert level == 0.2 and all(part.std() > 0.15 for part in noise)
    best = torch.stack([view[:, :, 1:-1, 1:-1] - images[:, :, 1 + dy:7 + dy, 1 + dx:7 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    assert best.flatten(2).std(2).min(0)[0].mean() == pytest.approx(0.2, rel=0.2)           # some move leaves nothing but noise
    student(images, sigma)
    student.net.extra_loss(teacher, images, (0, 7, 3))
    assert not torch.equal(views[1][0], view)
    teacher(*views[0])
    theirs = teacher.net.projector(teacher.net.summary).detach().double().numpy()
    similar = (ours / np.linalg.norm(ours, axis=1)[:, None]) @ (theirs / np.linalg.norm(theirs, axis=1)[:, None]).T / 0.2
    expected = -np.mean(similar.diagonal() - np.log(np.exp(similar).sum(1)))
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-4)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.net.blocks[0].mlp.up.weight.grad.any()


def test_views_are_moved_by_a_pixel_at_most():
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    views, seen = ddae.moved(images, torch.Generator().manual_seed(0)), set()
    rows = np.arange(8)
    shifts = {(dy, dx): images[0, 0].numpy()[np.clip(rows + dy, 0, 7)][:, np.clip(rows + dx, 0, 7)] for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    for view in views:
        seen.add(next(shift for shift, expected in shifts.items() if np.array_equal(view[0].numpy(), expected)))
    assert len(seen) == 9


def test_the_probe_finds_what_is_linear_and_nothing_else():
    x, held_out = torch.randn(1000, 6), torch.arange(1000) % 5 == 0
    labels = (x @ torch.randn(6, 3)).argmax(1)
    assert ddae.probe(x, labels, held_out, 3) > 0.95
    assert ddae.probe(torch.randn(1000, 6), labels, held_out, 3) < 0.55


# ---- muP ----

@pytest.mark.parametrize("block", FAMILIES)
def test_at_the_base_width_mup_is_the_core(block):
    torch.manual_seed(5)
    core = DiT(DiTConfig(**SMALL, block=block))
    torch.manual_seed(5)
    net = mup.Config(**SMALL, block=block, base_width=32).network()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), core.parameters(), strict=True)) and set(net.rates.values()) == {1.0}
    awake(net).load_state_dict(awake(core).state_dict())
    assert torch.equal(net(*INPUT), core(*INPUT))


def test_mup_scales_rates_initialisation_and_output_by_width():
    wide = SMALL | dict(width=128)
    plain, mp = (awake(mup.Config(**wide, block=block, base_width=32).network()) for block in ("plain", "mp"))
    for net, rate in ((plain, 1 / 4), (mp, 1 / 2)):
        rates = {name: net.rates.get(p, 1.0) for name, p in net.named_parameters()}
        hidden = {name for name, p in net.named_parameters() if p.ndim == 2 and not name.startswith(("input.patch", "input.label", "output.linear"))}
        assert {name for name, value in rates.items() if value == rate} == hidden
        assert {name: value for name, value in rates.items() if value not in (1.0, rate)} == ({"output.linear.bias": 4.0} if net is plain else {})
        core = DiT(DiTConfig(**wide, block=net.config.block))
        core.load_state_dict(net.state_dict())
        torch.testing.assert_close(net(*INPUT), core(*INPUT) * rate)
    stds = [{name: p.std().item() for name, p in mup.Config(**SMALL | dict(width=width), block="plain", base_width=32).network().named_parameters()}
            for width in (32, 512)]
    for name, growth in (("input.patch.weight", 1), ("input.label.weight", 1), ("input.noise.0.weight", 4), ("input.noise.2.weight", 4), ("blocks.0.attention.qkv.weight", 4)):
        assert stds[0][name] / stds[1][name] == pytest.approx(growth, rel=0.25)
    optimizer = build(TrainConfig(model=mup.Config(**wide, base_width=32)), torch.device("cpu"))[2]
    assert sorted(group["rate"] for group in optimizer.param_groups) == [0.5, 1.0]


@pytest.mark.parametrize("block, learning_rate", [("plain", 0.0003), ("mp", 0.01)])
def test_coordinate_check(block, learning_rate):
    digits, slopes = load_dataset("digits"), {}
    for Class in (DiTConfig, mup.Config):
        changes = [mup.block_changes(TrainConfig(learning_rate=learning_rate, model=Class(**SMALL | dict(width=width, heads=width // 32, block=block))),
                                     digits, 5) for width in (64, 128)]
        slopes[Class] = np.log2(np.divide(*changes[::-1]))
    assert np.abs(slopes[mup.Config]).max() < 0.15 and slopes[DiTConfig].min() > 0.25


def test_training_applies_the_rates(tmp_path):
    """Adam's first step moves everything by its rate, and the output starts at zero."""
    done("train.py", *TINY, "--variant=mup", "--model.block=plain", "--model.base_width=8", "--steps=1", "--warmup_steps=0", "--learning_rate=0.001",
         f"--out={tmp_path}", "--sample_every=0")
    weights = torch.load(tmp_path / "state.pt", weights_only=True)["weights"]
    assert weights["net.output.linear.weight"].abs().median().item() == pytest.approx(0.001, rel=0.01)
    assert weights["net.output.linear.bias"].abs().median().item() == pytest.approx(0.004, rel=0.01)


# ---- through the commands ----

@pytest.mark.parametrize("variant, options", [("ladder", ["--model.rung=C", "--model.modulation=scale,shift,gate"]), ("scalelong", ["--model.skip_scaling=learned"]),
                                              ("ddae", ["--model.contrast=0.1", "--micro_batch=8"]), ("mup", ["--model.base_width=16"])])
def test_a_variant_trains_resumes_samples_and_is_reconstructed_like_the_core(tmp_path, variant, options):
    options = [*TINY, f"--variant={variant}", *options, "--sample_every=0", "--snapshot_every=4", "--save_every=4"]
    done("train.py", *options, "--steps=8", f"--out={tmp_path / 'whole'}")
    done("train.py", *options, "--steps=5", f"--out={tmp_path / 'run'}")
    assert (tmp_path / "run" / "samples" / "0000005.png").exists()
    done("train.py", *options, "--steps=8", f"--out={tmp_path / 'run'}")
    (tmp_path / "run" / "ema" / "0000005-0.050.pt").unlink()
    (tmp_path / "run" / "ema" / "0000005-0.100.pt").unlink()
    lines = [line for line in log(tmp_path / "run") if "changed" not in line]
    assert lines == log(tmp_path / "whole")
    (tmp_path / "run" / "log.jsonl").write_bytes((tmp_path / "whole" / "log.jsonl").read_bytes())
    assert same_run(tmp_path / "run", tmp_path / "whole")
    done("sample.py", tmp_path / "run", "--ema=0.07", "--steps=2", "--labels", 3, "--columns=2")
    denoiser, _ = load_denoiser(tmp_path / "run", torch.device("cpu"))
    assert type(denoiser.net.config) is config_class(variant) and (tmp_path / "run" / "ema" / "posthoc" / "0000008-0.070.pt").exists()


def test_the_variant_in_the_readme_works(tmp_path, monkeypatch):
    (tmp_path / "variants").mkdir()
    (tmp_path / "variants" / "twice.py").write_text(re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    done("train.py", *TINY, "--variant=twice", "--model.times=3", "--steps=1", f"--out={tmp_path / 'run'}", "--sample_every=0")
    denoiser, _ = load_denoiser(tmp_path / "run", torch.device("cpu"))
    calls = []
    denoiser.net.blocks[0].register_forward_hook(lambda *args: calls.append(1))
    denoiser(torch.zeros(1, 1, 8, 8), 1.0)
    assert len(calls) == 3


def test_the_commands_of_variants_print_their_tables(tmp_path, capsys, monkeypatch):
    done("train.py", *TINY, "--variant=ddae", "--steps=3", f"--out={tmp_path}", "--sample_every=0")
    for main, words in ((ddae.main, ["--sigma", "0.2"]), (scalelong.main, ["--after", "0"])):
        monkeypatch.setattr("sys.argv", ["variant", str(tmp_path), *words])
        main()
    accuracies, deviations = (line.split()[1:] for line in capsys.readouterr().out.splitlines()[2::3])
    assert len(accuracies) == 2 and all(10 < float(value.rstrip("%")) < 100 for value in accuracies)
    values = np.array([[line[name] for name in ("token_rms_first", "token_rms_middle", "token_rms_last", "gradient_norm")] for line in log(tmp_path)])
    expected = np.stack([values.std(0), (values[1:] - values[:-1]).std(0)], axis=1).flatten()
    assert [float(value.strip("()")) for value in deviations] == pytest.approx(expected, abs=1e-4)
    for main, words in ((ddae.main, [str(tmp_path), "--sigma", "0"]), (ddae.main, [str(tmp_path / "none")]), (scalelong.main, [str(tmp_path)]),
                        (scalelong.main, [str(tmp_path / "none")]), (mup.main, ["--widths", "64"]), (mup.main, ["--widths", "16", "32"]), (mup.main, ["--widths", "128", "64"]),
                        (mup.main, ["--steps", "1"]), (mup.main, [f"--out={tmp_path / 'a.txt'}"]), (mup.main, [f"--out={tmp_path / 'log.jsonl' / 'a.png'}"])):
        monkeypatch.setattr("sys.argv", ["variant", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("sys.argv", ["mup", "--widths", "32", "64", "--steps=2", "--seeds=1", f"--out={tmp_path / 'mup.png'}"])
    mup.main()
    assert capsys.readouterr().out.count("output") == 4 and (tmp_path / "mup.png").exists()


@pytest.mark.parametrize("options, message", [
    (["--variant=scalelog"], "train.py: variant: there is no variants/scalelog.py"),
    (["--variant=../train"], "train.py: variant: there is no variants/../train.py"),
    (["--model.kappa=0.5"], "train.py: --model.kappa: unknown key"),
    (["--variant=scalelong", "--model.kapa=0.5"], "train.py: --model.kapa: unknown key; did you mean 'model.kappa'?"),
    (["--variant=scalelong", "--model.kappa=2"], "train.py: --model.kappa: 2.0 is not in (0, 1]"),
    (["--variant=scalelong", "--model.skip_scaling=x"], "train.py: --model.skip_scaling: 'x' is not one of "),
    (["--variant=scalelong", "--model.depth=1"], "train.py: --model.depth: 1 is too little"),
    (["--variant=ladder", "--model.modulation=scale,shift,gate", "--model.rung=J"], "train.py: --model.rung: 'J' is not one of A, "),
    (["--variant=ladder", "--model.modulation=rotate,gate"], "train.py: --model.modulation: must be scale, shift and gate"),
    (["--variant=ladder", "--model.modulation=scale,shift,gate", "--model.block=plain"], "train.py: --model.block: leave it out"),
    (["--variant=ddae", "--model.bottleneck=9"], "train.py: --model.bottleneck: 9 does not leave a block"),
    (["--variant=ddae", "--model.contrast=-1"], "train.py: --model.contrast: -1.0 is not a weight"),
    (["--variant=mup", "--model.base_width=-2"], "train.py: --model.base_width: -2 is not positive"),
])
def test_bad_variants_are_one_line(tmp_path, options, message):
    result = call("train.py", *TINY, f"--out={tmp_path / 'run'}", *options)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith(message), result.stderr
