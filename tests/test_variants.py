"""Each variant against what it is a diff of, its equations computed another way, and the commands with its name."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import load_dataset
from helpers import FAMILIES, ROOT, TINY, awake, call, close, count_parameters, done, initial_rms, log, rms, run
from layers import normalize
from model import Denoiser, DiT, DiTConfig, edm2_loss, position_embedding
from plumbing.command import UserError
from plumbing.config import config_class, load_config
from plumbing.files import digest, load_file
from sample import load_denoiser
from tools import plots, probe
from train import TrainConfig, build, optimizer_step
from variants import ddae, ladder, muon, mup, paper, scalelong, unet, uvit

SMALL = dict(depth=3, width=32, heads=2, patch=2, image_size=8, channels=1, num_classes=10)
UNET = dict(base=16, multipliers=(1, 2), blocks=1, attention=(4,), image_size=8, channels=1, num_classes=10)
INPUT = (torch.randn(4, 1, 8, 8), torch.randn(4), torch.tensor([0, 3, 9, 10]))
TOKENS, COND, CPU = torch.randn(3, 16, 32), torch.randn(3, 32), torch.device("cpu")
SKIPS = pytest.mark.parametrize("options", [
    *(dict(skip_scaling=scaling) for scaling in ("none", "sqrt", "learned")), dict(skip_scaling="constant", kappa=0.6),
    dict(skip_scaling="learned", skip_shared=False)])


@pytest.fixture(autouse=True)
def no_grids(monkeypatch):
    """Trainings draw no samples at their end, which would take longer than the few steps before it."""
    monkeypatch.setattr("train.save_samples", lambda *run: None)


def as_rung_a(state):
    """Weights of the plain network by the names that rung A gives them."""
    weights = {}
    for name, weight in state.items():
        for theirs, ours in (("mlp.0", "mlp.up"), ("mlp.2", "mlp.down"), ("noise.2", "noise.1")):
            name = name.replace(theirs, ours)
        if "blocks" in name and "modulation" in name:
            scale1, shift1, gate1, scale2, shift2, gate2 = weight.chunk(6)
            for part, rows in (("modulation1", [scale1, shift1]), ("gate1", [gate1]),
                               ("modulation2", [scale2, shift2]), ("gate2", [gate2])):
                weights[name.replace("modulation", f"{part}.linear")] = torch.cat(rows)
        else:
            weights[name.replace("output.modulation", "output.modulation.linear")] = weight
    return weights


def test_the_ends_of_the_ladder_are_the_two_families():
    mp, top = DiT(DiTConfig(**SMALL, modulation=("scale", "shift", "gate"))), ladder.Config(**SMALL, rung="I").network()
    top.load_state_dict(awake(mp).state_dict())
    assert torch.equal(top(*INPUT), mp(*INPUT))

    plain, bottom = DiT(DiTConfig(**SMALL, block="plain")), ladder.Config(**SMALL, rung="A").network()
    for name, weight in as_rung_a(plain.state_dict()).items():  # they also start alike
        assert bottom.state_dict()[name].std() == pytest.approx(weight.std().item(), rel=0.5), name
    bottom.load_state_dict(as_rung_a(awake(plain).state_dict()))
    close(bottom(*INPUT), plain(*INPUT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rung", "ABCDEFGHI")
def test_every_rung_starts_at_zero_learns_and_has_its_parts(rung):
    denoiser, _, optimizer = build(TrainConfig(model=ladder.Config(**SMALL, residual_t=0.3, rung=rung)), CPU)
    net, (x, h) = denoiser.net, torch.randn(2, 1, 16, 32)
    assert not net(*INPUT).any()
    for _ in range(4):
        (denoiser(INPUT[0], 1.0, INPUT[2]).square().mean() + denoiser.uncertainty(torch.ones(1)).mean()).backward()
        optimizer_step(denoiser, optimizer, 0.01)
    assert net(*INPUT).any()
    unforced = [name for name, p in denoiser.named_parameters() if p.ndim == 2 and (rms(p) - 1).abs().max() > 1e-4]
    labels = ["net.input.label.weight"] if rung < "I" else []
    assert unforced == labels if rung >= "D" else "net.output.linear.weight" in unforced
    names = {type(module).__name__ for module in net.modules()}
    parts = {"PlainAttention": rung < "B", "Linear": rung < "C", "ZeroModulation": rung < "E", "GELUMLP": rung < "F",
             "LayerNorm": rung < "G", "MPEmbedding": rung >= "I"}
    assert {name: name in names for name in parts} == parts
    close(net.blocks[0].join(x, h), (0.7 * x + 0.3 * h) / 0.58**0.5 if rung >= "E" else x + h)
    close(rms(net.input.position), torch.full((16,), 1.0 if rung >= "H" else 0.5**0.5))


def skip_factor(net, i, size, skip):
    """The factor on skip i, which is of size number `size`. Learned networks are of a size, or of one skip."""
    if net.config.skip_scaling != "learned":
        return {"none": 1.0, "sqrt": 0.5**0.5, "constant": 0.6**i}[net.config.skip_scaling]
    first, _, second, _ = net.scales[size if net.config.skip_shared else i].net
    return second(first(skip.mean(-1).flatten(1)).relu()).sigmoid().view(*skip.shape[:-1], 1)


@SKIPS
@pytest.mark.parametrize("block", FAMILIES)
def test_long_skips_join_mirrored_blocks_at_magnitude_1(block, options):
    net = awake(scalelong.Config(**SMALL | options | dict(depth=5, block=block)).network())
    learned = net.scales.parameters() if (net.config.skip_scaling, block) == ("learned", "mp") else ()
    assert {p: scale for p, scale in net.lr_scale.items() if scale != 1} == dict.fromkeys(learned, 0.1)

    def joined(i, x, skip):
        s = skip_factor(net, i, 0, skip)
        if block == "plain":
            return net.joins[i](torch.cat([x, s * skip], dim=-1))
        return normalize(torch.cat([normalize(x), s * skip], dim=-1)) @ F.normalize(net.joins[i].weight, dim=1).T

    def first_half(i, x):
        return normalize(net.blocks[i](x, COND)) if block == "mp" else net.blocks[i](x, COND)

    a = first_half(0, TOKENS)
    b = first_half(1, a)
    x = net.blocks[3](joined(1, net.blocks[2](b, COND), b), COND)
    close(net.run_blocks(TOKENS, COND), net.blocks[4](joined(0, x, a), COND), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", FAMILIES)
def test_ddae_conditions_later_blocks_on_the_summary(block):
    core = DiT(DiTConfig(**SMALL, block=block))
    without = ddae.Config(**SMALL, block=block, self_conditioning=False).network()
    without.load_state_dict(awake(core).state_dict())
    assert torch.equal(without(*INPUT), core(*INPUT)) and without.extra_loss(None, None, None) == 0.0

    net = awake(ddae.Config(**SMALL, block=block, bottleneck=2).network())
    middle = net.blocks[1](net.blocks[0](TOKENS, COND), COND)
    told = net.condition(normalize(middle.mean(1)))
    told = (0.7 * COND + 0.3 * told) / 0.58**0.5 if block == "mp" else COND + told
    close(net.run_blocks(TOKENS, COND), net.blocks[2](middle, told), rtol=1e-4, atol=1e-4)


def test_contrastive_loss_is_infonce_for_the_student_alone():
    student, teacher = (awake(Denoiser(ddae.Config(**SMALL, contrast=0.5))) for _ in range(2))
    images, views = 2.0 * torch.randint(-2, 3, (6, 1, 8, 8)), []
    teacher.register_forward_pre_hook(lambda teacher, inputs: views.append(inputs))
    student(images, 0.3)
    ours = student.net.projector(student.net.summary)
    loss = student.net.extra_loss(teacher, images, torch.Generator().manual_seed(5))
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.net.blocks[0].mlp.up.weight.grad.any()
    (view, sigma), = views  # without labels
    teacher(view, sigma)
    similar = F.cosine_similarity(ours[:, None], teacher.net.projector(teacher.net.summary), dim=-1) / 0.2
    close(loss, 0.5 * (similar.exp().sum(1).log() - similar.diagonal()).mean())
    moved, border = 2 * (view / 2).round(), F.pad(images, (1, 1, 1, 1), mode="replicate")
    assert sigma == 0.2 and (view - moved).std().item() == pytest.approx(0.2, rel=0.1) and (moved != images).any()
    windows = torch.stack([border[:, :, y:y + 8, x:x + 8] for y in range(3) for x in range(3)])
    assert (windows == moved).flatten(2).all(2).any(0).all()  # moved by an eighth of the side at most


def test_the_probe_finds_what_is_linear_and_nothing_else():
    x, held_out = torch.randn(1000, 6), torch.arange(1000) % 5 == 0
    labels = (x @ torch.randn(6, 3)).argmax(1)
    assert probe.probe(x, labels, held_out, 3) > 0.95 and probe.probe(torch.randn(1000, 6), labels, held_out, 3) < 0.55


@pytest.mark.parametrize("base", [32, 128])
@pytest.mark.parametrize("block", FAMILIES)
def test_mup_scales_by_width_and_is_the_core_at_the_base_width(block, base):
    wide, scale = SMALL | dict(width=128, block=block), base / 128 if block == "plain" else (base / 128) ** 0.5
    denoiser, _, optimizer = build(TrainConfig(model=mup.Config(**wide, base_width=base)), CPU)
    core, net = DiT(DiTConfig(**wide)), awake(denoiser.net)
    core.load_state_dict(net.state_dict())
    close(net(*INPUT), core(*INPUT) * scale)
    optimizer_step(denoiser, optimizer, 0.1)
    rates = {p: group["lr"] / 0.1 for group in optimizer.param_groups for p in group["params"]}
    for name, p in net.named_parameters():
        hidden = p.ndim == 2 and not name.startswith(("input.patch", "input.label", "output.linear"))
        assert rates[p] == pytest.approx(scale if hidden else 128 / base if name == "output.linear.bias" else 1), name
    if block == "plain":  # variances: 1/fan_in, or fixed for inputs
        stds = {name: net.state_dict()[f"input.{name}.weight"].std().item() for name in ("noise.0", "noise.2", "patch")}
        hidden = 0.02 * (base / 128) ** 0.5
        assert stds == pytest.approx({"noise.0": hidden, "noise.2": hidden, "patch": (2 / (4 + base)) ** 0.5}, rel=0.1)


@pytest.mark.parametrize("block, learning_rate", [("plain", 0.0003), ("mp", 0.01)])
def test_with_mup_steps_change_wide_networks_as_much_as_narrow(block, learning_rate):
    """In log-log. Over two runs the slope of a block may be off by 0.1, but alike with muP and without."""
    def changes(Class, width):
        model = Class(**SMALL | dict(width=width, heads=width // 32, block=block))
        configs = [TrainConfig(seed=seed, batch=16, learning_rate=learning_rate, model=model) for seed in (0, 1)]
        return np.log([mup.block_changes(config, load_dataset("digits"), 5) for config in configs]).mean(0)

    without, with_mup = ((changes(Class, 128) - changes(Class, 64)) / np.log(2) for Class in (DiTConfig, mup.Config))
    assert np.abs(with_mup[:3]).max() < 0.3 and (without - with_mup).min() > 0.2


def test_networks_have_the_published_numbers_of_parameters():
    config = load_config(TrainConfig, [f"--config={ROOT}/configs/imagenet64-unet.toml"]).model.for_data(64, 3, 1000)
    assert count_parameters(config) == pytest.approx(280e6, rel=0.005)
    with torch.device("meta"):
        attention = [number for number, block in enumerate(config.network().blocks) if block.attention]
    encoder, decoder = [8, 9, 10, 12, 13, 14], [15, 17, 18, 19, 20, 22, 23, 24, 25]
    assert attention == encoder + decoder
    latents = dict(size="S", patch=4, image_size=16, channels=4, num_classes=1000)
    variance = 64 * 384  # rows of the output that DDPM's learned variance has there
    for kinds, count in ((("scale", "shift", "gate"), 32_849_739), (("scale", "rotate", "gate"), 31_006_539)):
        assert count_parameters(paper.Config(**latents, modulation=kinds)) + variance == count
    small = dict(depth=13, width=512, heads=8, patch=2, image_size=32, channels=3, num_classes=10)
    for block in FAMILIES:
        assert count_parameters(uvit.Config(**small, block=block)) == pytest.approx(44e6, rel=0.01)


def convolved(layer, x):
    """The output of an MPConv for a feature map with its channels in dimension 1."""
    kernels = F.normalize(layer.weight, dim=1).view(-1, 3, 3, x.shape[1])
    return F.conv2d(x, kernels.permute(0, 3, 1, 2), padding=1)


@pytest.mark.parametrize("kind, resample",
                         [("encoder", None), ("encoder", unet.downsample), ("decoder", unet.upsample)])
def test_a_unet_block_is_the_papers_figure(kind, resample):
    block, x, cond = unet.Block(kind, 8, 16, 32, resample, attention=True), torch.randn(3, 6, 6, 8), COND
    awake(block)
    scale = block.gain * cond @ F.normalize(block.scale.weight, dim=1).T
    h = x.permute(0, 3, 1, 2)
    if resample:
        h = F.avg_pool2d(h, 2) if resample is unet.downsample else F.interpolate(h, scale_factor=2)
    main = F.conv2d(h, F.normalize(block.main.weight, dim=1)[..., None, None])
    if kind == "encoder":
        main = main / main.square().mean(1, keepdim=True).sqrt()
        h = main
    branch = convolved(block.conv1, F.silu(h) / 0.596) * (1 + scale[..., None, None])
    h = (0.7 * main + 0.3 * convolved(block.conv2, F.silu(branch) / 0.596)) / 0.58**0.5
    tokens = h.flatten(2).transpose(1, 2)
    tokens = (0.7 * tokens + 0.3 * block.attention(tokens)) / 0.58**0.5
    close(block(x, cond).flatten(1, 2), tokens, rtol=1e-4, atol=1e-4)
    if kind == "decoder":
        assert block(1e6 * x, cond).abs().max() == 256


@SKIPS
def test_the_unet_joins_its_skips_the_last_one_first(options):
    net, seen, (_, c_noise, labels) = unet.Config(**UNET, self_conditioning=True, **options).network(), [], INPUT
    for block in awake(net).blocks:
        block.register_forward_hook(lambda block, inputs, x: seen.append((*inputs, x)))
    net(*INPUT)
    inputs, conds, outputs = zip(*seen)  # three blocks of the encoder, seven others
    skips = [inputs[0], *outputs[:3]]
    assert [skip.shape[1:] for skip in skips] == [(8, 8, 16), (8, 8, 16), (4, 4, 16), (4, 4, 32)]
    assert [x.shape[1:3] for x in outputs[3:]] == [(4, 4)] * 4 + [(8, 8)] * 3
    for i, number in ((3, 5), (2, 6), (1, 8), (0, 9)):  # block 7 doubles
        x, skip, s = outputs[number - 1], skips[i], skip_factor(net, i, i // 2, skips[i])
        Na, Nb = x.shape[-1], skip.shape[-1]
        both = torch.cat([x / Na**0.5, s * skip / Nb**0.5], dim=-1) * ((Na + Nb) / (1 + s**2)) ** 0.5
        close(inputs[number], both)  # of magnitude 1
    label = F.pad(F.normalize(net.label.weight, dim=1) * 10**0.5, (0, 1)).T[labels]  # 0 for the null label
    cond = F.silu((net.noise(c_noise) + label) / 2**0.5) / 0.596
    summary = normalize(outputs[4].mean((1, 2)))  # of the last block before the first join
    later = (0.7 * cond + 0.3 * net.condition(summary)) / 0.58**0.5
    close(conds, (cond,) * 5 + (later,) * 5)


@pytest.mark.parametrize("block", FAMILIES)
def test_uvit_has_noise_level_label_and_patches_as_tokens(block):
    net, tokens = uvit.Config(**SMALL, block=block).network(), []
    torch.nn.init.normal_(awake(net).conv.weight)  # it starts as the identity
    net.run_blocks = lambda x, cond: tokens.append(x) or x
    x, c_noise, labels = INPUT
    image = net(*INPUT)
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)  # (B, T, P²)
    noise, label = net.input.fourier(c_noise), net.input.label.weight[labels]
    expected = torch.cat([noise[:, None], label[:, None], net.input.patch(patches)], dim=1) + net.input.position.weight
    close(tokens[0], expected / 2**0.5 if block == "mp" else expected)
    out = tokens[0][:, 2:] if block == "mp" else net.output.norm(tokens[0][:, 2:])
    out = F.fold(net.output.linear(out).transpose(1, 2), 8, 2, stride=2)  # the patches side by side
    close(image, net.gain * convolved(net.conv, out) if block == "mp" else net.conv(out), rtol=1e-4, atol=1e-5)


def test_a_plain_uvit_block_is_torchs_pre_norm_transformer_layer():
    block = awake(uvit.Config(**SMALL, block="plain").network()).blocks[0]
    reference = torch.nn.TransformerEncoderLayer(32, 2, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    names = ("norm1.weight", "norm1.bias", "self_attn.in_proj_weight", "self_attn.in_proj_bias",
             "self_attn.out_proj.weight", "self_attn.out_proj.bias", "norm2.weight", "norm2.bias", "linear1.weight",
             "linear1.bias", "linear2.weight", "linear2.bias")
    reference.load_state_dict(dict(zip(names, block.state_dict().values())))
    close(block(TOKENS, None), reference(TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config, blocks", [
    (unet.Config(base=64, image_size=64, channels=3, num_classes=10), 36),
    (uvit.Config(**SMALL | dict(depth=13, width=128)), 13)])
def test_mp_networks_keep_rms_near_1_at_initialisation(config, blocks):
    seen = initial_rms(config)
    assert len(seen) == blocks and 0.8 < min(seen) and max(seen) < 1.2


@pytest.mark.parametrize("config", [
    unet.Config(**UNET), unet.Config(**UNET | dict(num_classes=0), skip_scaling="learned"),
    unet.Config(**UNET, self_conditioning=True, contrast=0.1), uvit.Config(**SMALL),
    uvit.Config(**SMALL, block="plain"), uvit.Config(**SMALL | dict(num_classes=0), skip_scaling="learned"),
    paper.Config(**SMALL), paper.Config(**SMALL, modulation=("scale", "shift"))])
def test_networks_start_at_zero_and_steps_lower_the_loss(config):
    denoiser, ema, optimizer = build(TrainConfig(model=config), CPU)
    images, noise = torch.randn(16, 1, 8, 8) * 0.5, torch.randn(16, 1, 8, 8)
    labels, losses = torch.arange(16) % (config.num_classes + 1), []
    assert not denoiser.net(images, torch.randn(16), labels).any()
    awake(denoiser)
    for step in range(6):
        optimizer.zero_grad()
        loss = edm2_loss(denoiser, denoiser.uncertainty(torch.ones(16)), images, labels, torch.ones(16), noise)
        generator = torch.Generator().manual_seed(step)
        (loss + denoiser.net.extra_loss(ema.averages[0.05], images, generator)).backward()
        assert not [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()]
        optimizer_step(denoiser, optimizer, 0.01 if config.block == "mp" else 0.001)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("axis, curves", [
    (float, {"a < b & c": [(0, 0.5), (10, -2.0), (20, 7.2)], "other": [(5, 3.0), (20, 7.0)]}),
    (math.log10, {"wide": [(0, 0.05), (10, 20.0)], "other": [(5, 3.0), (10, 19.0)]})])
def test_a_plot_has_a_named_line_for_each_curve_at_its_values(tmp_path, axis, curves):
    grid = {"V": [], "H": []}
    plots.save_plot(tmp_path / "plot.svg", curves, "step", "loss")
    parts = list(ElementTree.parse(tmp_path / "plot.svg").getroot())
    for line, label in zip(parts, parts[1:]):
        if line.tag.endswith("path"):  # a line of the grid, then its label
            x, y, direction = re.fullmatch(r"M([\d.]+) ([\d.]+)([VH])[\d.]+", line.get("d")).groups()
            value = float(label.text)
            grid[direction].append((value, float(x)) if direction == "V" else (axis(value), float(y)))
    (slope_x, x0), (slope_y, y0) = (np.polyfit(*np.transpose(grid[direction]), 1) for direction in "VH")
    lines = [part.get("points").split() for part in parts if part.tag.endswith("polyline")]
    for line, curve in zip(lines, curves.values(), strict=True):
        places = [(x0 + slope_x * x, y0 + slope_y * axis(y)) for x, y in curve]
        np.testing.assert_allclose([list(map(float, point.split(","))) for point in line], places, atol=0.2)
    names = {part.text: float(part.get("y")) for part in parts if part.get("text-anchor") == "start"}
    title = "loss" if axis is float else "loss (logarithmic)"
    assert list(names) == [*curves, title] and abs(names["other"] - names[next(iter(curves))]) > 13  # legible


@pytest.mark.parametrize("variant, key", [("ladder", "--model.rung=C"), ("scalelong", "--model.skip_scaling=learned"),
                                          ("ddae", "--micro_batch=8"), ("mup", "--model.base_width=16"),
                                          ("unet", "--model.base=4"), ("uvit", "--model.block=mp")])
def test_a_variant_trains_resumes_and_samples_by_its_recipe(tmp_path, variant, key):
    tiny = [word for word in TINY if variant != "unet" or not word.startswith("--model.")]  # of a transformer
    recipe = [*tiny, f"--config={ROOT}/configs/{variant}.toml", key, "--dataset=digits", "--snapshot_every=2"]
    for name, steps in (("whole", 4), ("run", 3), ("run", 4)):
        done("train.py", *recipe, f"--steps={steps}", f"--out={tmp_path / name}")
    whole, run = (load_file(tmp_path / name / "state.pt") for name in ("whole", "run"))
    assert all(digest(run[part]) == digest(whole[part]) for part in ("weights", "ema", "optimizer"))
    done("sample.py", tmp_path / "whole", "--ema=0.07", "--steps=2", "--columns=1", f"--out={tmp_path / 'a.png'}")
    assert type(load_denoiser(tmp_path / "whole", CPU)[0].net.config) is config_class(variant, DiTConfig, "")


@pytest.mark.parametrize("modulation", [
    ("scale", "shift", "gate"), ("rotate", "gate"), ("rotate",), ("scale", "shift")])
def test_the_papers_network_is_that_of_its_equations(modulation):
    config = paper.Config(**SMALL | dict(num_classes=10), modulation=modulation)
    torch.manual_seed(0)
    net = awake(config.network())
    images, c_noise, labels = INPUT

    def mp_linear(x, layer):
        return x @ (layer.weight / layer.weight.norm(dim=1, keepdim=True)).T

    def mp_silu(x):
        return x * x.sigmoid() / 0.596

    def modulated(x, cond, part):
        values, place = mp_linear(cond, part.linear)[:, None], 0
        for kind, size in part.sizes.items():
            value = part.gain[list(part.sizes).index(kind)] * values[..., place:place + size]
            place += size
            if kind == "rotate":
                planes = torch.complex(x[..., :16], x[..., 16:]) * torch.polar(torch.ones_like(value), value)
                x = torch.cat([planes.real, planes.imag], -1)
            else:
                x = x * (1 + value) if kind == "scale" else x + value
        return x

    def add(x, branch, t):
        return ((1 - t) * x + t * branch) / ((1 - t)**2 + t**2)**0.5

    first = net.input
    patches = F.unfold(images, 2, stride=2).mT  # (B, T, 4)
    waves = torch.cos(c_noise[:, None] * first.fourier.freqs + first.fourier.phases)
    label = first.label.weight[labels] / first.label.weight[labels].square().mean(1, keepdim=True).sqrt()
    noise = mp_linear(mp_silu(mp_linear(waves, first.noise1)), first.noise2)
    cond = mp_silu(add(noise, label, 0.5))
    position = position_embedding(32, 4)
    position = position - position.mean(1, keepdim=True)
    position = torch.cat([position[:, 0::2], position[:, 1::2]], 1)  # neighbours make a plane
    x = mp_linear(torch.cat([patches, torch.ones(4, 16, 1)], -1), first.patch)
    x = add(x, position / position.std(1, keepdim=True, correction=0), 0.5)
    for block in net.blocks:
        kinds = modulated(x, cond, block.modulation1) if modulation and block.modulation1.sizes else x
        q, k, v = mp_linear(kinds, block.attention.qkv).view(4, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        q, k = (part / part.square().mean(-1, keepdim=True).sqrt() for part in (q, k))
        branch = mp_linear(((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2), block.attention.out)
        x = add(x, modulated(branch, cond, block.gate1) if block.gate1.sizes else branch, 0.3)
        kinds = modulated(x, cond, block.modulation2) if block.modulation2.sizes else x
        branch = mp_linear(mp_silu(mp_linear(kinds, block.mlp.up)), block.mlp.down)
        x = add(x, modulated(branch, cond, block.gate2) if block.gate2.sizes else branch, 0.3)
    last = net.output
    x = modulated(x, cond, last.modulation) if last.modulation.sizes else x
    expected = F.fold((last.gain * mp_linear(x, last.linear)).mT, 8, 2, stride=2)
    close(net(images, c_noise, labels), expected, rtol=1e-4, atol=1e-5)


def test_muon_keeps_singular_vectors_and_brings_values_near_1():
    for shape in ((8, 8), (24, 8), (8, 32)):
        U, values, V = np.linalg.svd(np.random.default_rng(0).normal(size=shape), full_matrices=False)
        values = np.geomspace(1, 0.02, 8)
        M = torch.from_numpy(U * values @ V).float()
        found = U.T @ muon.orthogonal(torch.stack([M, 0 * M]))[0].numpy() @ V.T
        assert 0.68 < np.diag(found).min() and np.diag(found).max() < 1.21
        np.testing.assert_allclose(found, np.diag(np.diag(found)), atol=1e-5)
        x = values / np.linalg.norm(values)
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        np.testing.assert_allclose(np.diag(found), x, atol=1e-5)
        assert not muon.orthogonal(M[None] * 0).any()


def test_muon_moves_each_part_by_the_rate_times_the_first_rms():
    torch.manual_seed(0)
    weights = [torch.randn(24, 8) * 0.3, torch.zeros(4, 16)]
    before, gradients = [w.clone() for w in weights], [[torch.randn(w.shape) for w in weights] for _ in range(2)]
    ours = muon.Muon([{"params": weights, "lr": 0.1}], {weights[0]: [8, 12, 4], weights[1]: [4]})
    for step in range(2):
        for w, gradient in zip(weights, gradients[step]):
            w.grad = gradient
        ours.step()
    for w, start, first, second, parts in zip(weights, before, *gradients, ([8, 12, 4], [4])):
        scale = start.square().mean().sqrt() if start.any() else 1 / 4
        m1, m2 = 0.05 * first, 0.95 * 0.05 * first + 0.05 * second
        for nesterov in (0.05 * first + 0.95 * m1, 0.05 * second + 0.95 * m2):
            updates = [muon.orthogonal(part[None])[0] * max(part.shape)**0.5 for part in nesterov.split(parts)]
            update = torch.cat(updates)
            assert update.square().mean().sqrt() == pytest.approx(1, abs=0.15)
            start = start - 0.1 * scale * update
        close(w, start)


@pytest.mark.parametrize("config", [
    DiTConfig(**SMALL, modulation=("rotate", "scale", "shift", "gate")), DiTConfig(**SMALL, block="plain"),
    uvit.Config(**SMALL), unet.Config(**UNET), ladder.Config(**SMALL, rung="C")])
def test_muon_takes_the_matrices_of_blocks_in_equal_turns(config):
    torch.manual_seed(0)
    denoiser, _, optimizer = build(TrainConfig(model=config, optimizer="muon", matrix_rate=0.5), CPU)
    net, parts = denoiser.net, optimizer.muon.parts
    assert {id(p) for p in parts} == {id(p) for p in net.blocks.parameters() if p.ndim == 2}
    assert all(sum(rows) == len(p) for p, rows in parts.items())
    fused = {name.split(".", 2)[2]: parts[p] for name, p in net.named_parameters() if len(parts.get(p, [])) > 1}
    if type(config) is DiTConfig:
        expected = {"modulation1.linear.weight": [32, 32, 16], "modulation2.linear.weight": [32, 32, 16],
                    "attention.qkv.weight": 3 * [32]}
        plain = {"modulation.weight": 6 * [32], "attention.qkv.weight": 3 * [32]}
        assert fused == (plain if config.block == "plain" else expected)
    elif not isinstance(config, unet.Config):
        assert fused["attention.qkv.weight"] == 3 * [32]
    muons = {id(p): group["lr_scale"] for group in optimizer.muon.param_groups for p in group["params"]}
    adams = {id(p) for group in optimizer.adam.param_groups for p in group["params"]}
    assert muons.keys() | adams == {id(p) for p in denoiser.parameters()} and not muons.keys() & adams
    before = {p: p.detach().clone() for p in parts}
    for p in denoiser.parameters():
        p.grad = torch.randn(p.shape)
    optimizer_step(denoiser, optimizer, 0.02)
    for p, start in before.items():  # cosine of the angle between rows, which is 0.01 times the RMS of the update
        angles = torch.cosine_similarity(p.double(), start.double()).clamp(max=1).acos() if start.any() else None
        assert angles is None or 0.007 < angles.square().mean().sqrt() < 0.0095


@pytest.mark.parametrize("config", ["digits", "unet"])
def test_with_muon_a_run_resumes_bit_for_bit(tmp_path, config):
    tiny = [word for word in TINY if config != "unet" or not word.startswith("--model.")]  # of a transformer
    recipe = [*tiny, f"--config={ROOT}/configs/{config}.toml", "--dataset=digits", "--optimizer=muon"]
    if config == "unet":
        recipe.append("--model.base=4")
    for name, steps in (("whole", 4), ("run", 3), ("run", 4)):
        done("train.py", *recipe, f"--steps={steps}", f"--out={tmp_path / name}")
    whole, run = (load_file(tmp_path / name / "state.pt") for name in ("whole", "run"))
    assert all(digest(run[part]) == digest(whole[part]) for part in ("weights", "ema", "optimizer"))


def test_the_variant_in_the_readme_works(tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "variants" / "README.md").read_text(), re.DOTALL)
    (tmp_path / "variants").mkdir()
    (tmp_path / "variants" / "twice.py").write_text(next(text for text in snippets if "class Twice(DiT)" in text))
    monkeypatch.syspath_prepend(tmp_path)
    done("train.py", *TINY, "--variant=twice", "--model.times=3", "--steps=1", f"--out={tmp_path}")
    net, x = load_denoiser(tmp_path, CPU)[0].net, TOKENS
    for block in [*net.blocks] * 3:
        x = block(x, COND)
    assert torch.equal(net.run_blocks(TOKENS, COND), x)


def test_a_variant_may_use_dropout_and_values_while_it_is_built(tmp_path, monkeypatch):
    (tmp_path / "variants").mkdir()
    (tmp_path / "variants" / "dropout.py").write_text("""
from dataclasses import dataclass
import torch
from model import DiT, DiTConfig
from plumbing.keys import key

@dataclass
class Config(DiTConfig):
    drop: float = key(0.5, "share of tokens to drop, 0.5 is 50%", 0, 1)

    def network(self):
        return Dropout(self)

class Dropout(DiT):
    def __init__(self, config):
        super().__init__(config)
        self.rates = [rate.item() for rate in torch.linspace(0, config.drop, config.depth)]

    def run_blocks(self, x, cond):
        for block, rate in zip(self.blocks, self.rates):
            x = torch.nn.functional.dropout(block(x, cond), rate, self.training)
        return x
""")
    (tmp_path / "variants" / "helpers.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert "variants/helpers.py is no network to train" in call("train.py", "--variant=helpers").stderr
    assert "0.5 is 50% [0.5]" in done("train.py", "--help", "--variant=dropout").stdout
    for name, steps in (("whole", 4), ("run", 3), ("run", 4)):
        done("train.py", *TINY, "--variant=dropout", f"--steps={steps}", f"--out={tmp_path / name}")
    whole, run = (load_file(tmp_path / name / "state.pt") for name in ("whole", "run"))
    assert digest(run["weights"]) == digest(whole["weights"])
    assert load_denoiser(tmp_path / "run", CPU)[0].net.rates[-1] == 0.5


def test_curves_are_means_over_runs_that_agree_in_their_keys(tmp_path, capsys, monkeypatch):
    plot = tmp_path.with_suffix(".svg")
    runs = [(0.5, "mp", 1.0), (0.5, "mp", 3.0), (2.0, "mp", 5.0), (2.0, "plain", 7.0), (4.0, "mp", "NaN")]
    for number, (rate, block, value) in enumerate(runs):
        run = tmp_path / str(number)
        run.mkdir()
        config = f'steps = 2\nlearning_rate = {rate}\nmodel.block = "{block}"\nmodel.modulation = ["rotate", "gate"]\n'
        (run / "config.toml").write_text(config)
        lines = '{"step": 1, "val_loss": 9}', f'{{"step": 2, "val_loss": {value}}}', '{"step": 3}'
        (run / "log.jsonl").write_text("\n".join(lines))
    curves = plots.last_values(sorted(tmp_path.iterdir()), "val_loss", "learning_rate", "model.block")
    assert curves == {"model.block = mp": [(-1, 2), (1, 5)], "model.block = plain": [(1, 7)]}
    printed = capsys.readouterr().out.splitlines()
    assert f"left out: {tmp_path / '4'}, nan after 2 of 2 steps" in printed
    assert "model.block = mp, learning_rate = 0.5: 2.0000 ± 1.4142 (2 runs)" in printed
    for against, by, message in (("nothing", None, "has no key 'nothing'"), ("learning_rate", "", "has no key ''"),
                                 ("model.modulation", None, "model.modulation = rotate,gate has no place")):
        with pytest.raises(UserError, match=message):
            plots.last_values([tmp_path / "0"], "val_loss", against, by)
    lists = plots.last_values([tmp_path / "0"], "val_loss", "learning_rate", "model.modulation")
    assert lists == {"model.modulation = rotate,gate": [(-1, 1)]}
    curves = plots.over_steps(sorted(tmp_path.iterdir()), ["val_loss", "step"], "learning_rate")
    assert curves["learning_rate = 2.0 val_loss"] == [(1, 9), (2, 6)] and len(curves) == 6
    assert curves["learning_rate = 4.0 val_loss"] == [(1, 9)] and curves["learning_rate = 0.5 step"][2] == (3, 3)
    options = "--key=val_loss", "--against=learning_rate", "--panels=steps,model.block", "--top=4"
    monkeypatch.setattr("sys.argv", ["plots.py", *map(str, sorted(tmp_path.iterdir())), *options, f"--out={plot}"])
    plots.main()
    panels = ElementTree.parse(plot).getroot().findall("{*}g")
    (mp,), (plain,) = [[line.get("points").split() for line in panel.findall("{*}polyline")] for panel in panels]
    assert len(mp) == 2 and len(plain) == 1  # 2 and 5, 7: the latter two are cut at 4
    assert mp[1].split(",")[1] == plain[0].split(",")[1] == f"{36 + 216 * 0.05 / 1.1:.1f}"
    titles = [[part.text for part in panel if part.text and "(cut" in part.text] for panel in panels]
    assert titles == [["2, mp: val_loss (cut at 4)"], ["2, plain: val_loss (cut at 4)"]]


def test_commands_print_their_tables_and_draw_their_plots(tmp_path):
    done("train.py", *TINY, "--variant=ddae", "--model.num_classes=0", "--steps=3", f"--out={tmp_path}")
    accuracies = done("tools.probe", tmp_path, "--sigma", 0.2).stdout.splitlines()[2].split()[1:]
    assert len(accuracies) == 2 and all(10 < float(value.rstrip("%")) < 100 for value in accuracies)
    deviations = done("variants.scalelong", tmp_path, "--after", 0).stdout.splitlines()[2].split()[1:]
    for column, name in enumerate(("token_rms_first", "token_rms_middle", "token_rms_last", "gradient_norm")):
        a, b, c = values = [line[name] for line in log(tmp_path) if name in line]
        assert deviations[2 * column:][:2] == [f"{np.std(values):.4f}", f"({abs(c - 2 * b + a) / 2:.4f})"]
    done("variants.mup", "--widths", 32, 64, "--steps=2", "--seeds=1", f"--out={tmp_path / 'mup.svg'}")
    done("tools.plots", tmp_path, "--key=loss,weight_rms", f"--out={tmp_path / 'loss.svg'}")
    assert [(tmp_path / name).read_text().count("<polyline") for name in ("mup.svg", "loss.svg")] == [4, 2]


def test_classifier_features_tell_digits_from_noise(tmp_path):
    features, noise = tmp_path / "features.pt", tmp_path / "noise.npz"
    said = done("tools.classifier", "digits", "--epochs=8", f"--out={features}").stdout
    assert float(re.match(r"accuracy on 100 held-out images: ([0-9.]+)%", said)[1]) > 90
    np.savez(noise, arr_0=np.random.default_rng(0).integers(0, 256, (100, 8, 8), dtype=np.uint8))
    near, far = (float(done("fid.py", "compare", "digits", other, f"--features=tools.classifier:{features}").stdout)
                 for other in (ROOT / "datasets/digits/holdout-images.npy", noise))
    assert 0 < near < far / 10


def test_mistakes_are_one_line_that_names_the_key():
    for module, name, value in ((scalelong, "depth", 1), (ladder, "modulation", ("scale",)), (ladder, "block", "plain"),
                                (ddae, "bottleneck", 3), (mup, "base_width", 0), (uvit, "modulation", ("scale",)),
                                (unet, "block", "plain"), (unet, "multipliers", (1,) * 5)):
        with pytest.raises(ValueError, match=f"^{name}: .*$"):
            module.Config(**(UNET if module is unet else SMALL) | {name: value})
    for command, word in (("tools.probe", "nowhere"), ("variants.scalelong", "nowhere"), ("tools.plots", "nowhere"),
                          ("variants.mup", "--out=a.png"), ("tools.classifier", "nowhere")):
        result = call(command, word)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and word[:5] in result.stderr
    with pytest.raises(UserError, match="^optimizer: muon"):
        build(TrainConfig(model=mup.Config(**SMALL, base_width=16), optimizer="muon"), CPU)


def test_a_variant_may_postpone_annotations_and_shows_its_bugs(tmp_path, monkeypatch):
    (tmp_path / "variants").mkdir()
    source = (tmp_path / "variants" / "later.py")
    source.write_text("""
from __future__ import annotations
from dataclasses import dataclass
from model import DiT, DiTConfig
from plumbing.keys import key

@dataclass
class Config(DiTConfig):
    times: int = key(2, "how often", 1, 100)
    names: tuple[str, ...] = key(("a",), "some names", choices=("a", "b"))

    def network(self):
        return Later(self)

class Later(DiT):
    def load_state_dict(self, *args, **options):
        raise AttributeError("a bug")
""")
    monkeypatch.syspath_prepend(tmp_path)
    words = *TINY, "--variant=later", "--model.times=3", "--model.names=a,b", f"--out={tmp_path / 'run'}"
    assert call("train.py", *words, "--model.times=x").returncode == 2
    done("train.py", *words, "--steps=1")
    net = load_denoiser(tmp_path / "run", CPU)[0].net
    assert net.config.times == 3 and net.config.names == ("a", "b")
    monkeypatch.setattr(Denoiser, "load_state_dict", lambda self, state: self.net.load_state_dict(state))
    with pytest.raises(AttributeError, match="a bug"):
        load_denoiser(tmp_path / "run", CPU)
    with pytest.raises(AttributeError, match="a bug"):
        call("train.py", *words, "--steps=2")
