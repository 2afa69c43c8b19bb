import math
import random
import threading

import numpy as np
import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ema import PowerEMA, inner_products, plan, reconstruct, solve_coefficients, std_to_gamma
from helpers import call
from plumbing.files import digest, load_file, save_file
from plumbing.snapshots import list_snapshots, load_snapshots, save_snapshot


def tracked(values, std, every=1, dtype=torch.float64):
    """The average of a one-parameter module that takes these values, one a step, updated every so many steps."""
    module = torch.nn.Linear(1, 1, bias=False).to(dtype)
    ema = PowerEMA(module, stds=(std,))
    for step, value in enumerate(values, 1):
        module.weight.data.fill_(value)
        if step % every == 0:
            ema.update(module, step)
    return ema.averages[std].weight.item()


@pytest.mark.parametrize("std, every, dtype, error", [
    (0.05, 1, torch.float64, 1e-9), (0.25, 5, torch.float64, 1e-9), (0.1, 1, torch.bfloat16, 1e-4)])
def test_average_weighs_steps_by_the_power_function(std, every, dtype, error):
    """Unit impulses read the weights off: each is the integral of the profile t^gamma since the update before."""
    for at in range(every, 61, every):
        weight, power = tracked([float(s == at) for s in range(1, 61)], std, every, dtype), std_to_gamma(std) + 1
        assert weight == pytest.approx((at / 60) ** power - ((at - every) / 60) ** power, rel=error, abs=1e-3 * error)


def test_the_power_function_has_the_width_it_is_named_after():
    for std in np.linspace(0.001, 0.288, 50):
        gamma = std_to_gamma(std)
        assert math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(std, rel=1e-9)  # [EDM2, Eq. 123]


def profile(t, step, std):
    """(gamma + 1)·(t / step)^gamma / step on 0..step, which has the integral 1."""
    gamma = std_to_gamma(std)
    return (gamma + 1) * (t / step) ** gamma / step * (t <= step)


def test_a_plan_says_which_widths_will_be_in_reach():
    t, residuals = np.linspace(0, 20, 200001), dict(plan(20, (0.05, 0.10)))
    sources = np.stack([profile(t, step, std) for step in range(1, 21) for std in (0.05, 0.10)], axis=1)
    for width in (0.02, 0.15, 0.25):
        wanted = profile(t, 20, width)
        left = wanted - sources @ np.linalg.lstsq(sources, wanted, rcond=None)[0]
        assert residuals[width] == pytest.approx(np.linalg.norm(left) / np.linalg.norm(wanted), rel=0.05)
    lines = call("ema.py", "--plan=20", "--std", "0.05", "0.10").stdout.splitlines()
    assert lines[0] == "width 0.02   profile  8.67% off  too far off" and lines[3].endswith("0.00% off  trust it")


def test_inner_products_and_best_fit_agree_with_quadrature():
    """Gauss-Legendre between the steps, where profiles end; t^(1/4) is its variable, in which the powers are smooth."""
    sources = [(step, std) for step in range(100, 2001, 100) for std in (0.05, 0.10)]
    targets = [(2000, 0.02), (2000, 0.25), (1500, 0.10)]  # the last one is a source
    nodes, weights = np.polynomial.legendre.leggauss(50)
    ends = np.arange(0, 2001, 100) ** 0.25
    u = (ends[:-1, None] * (1 - nodes) + ends[1:, None] * (1 + nodes)) / 2
    t, weights = u.ravel() ** 4, (weights * np.diff(ends)[:, None] / 2 * 4 * u**3).ravel()
    ours, wanted = (np.stack([profile(t, *pair) for pair in pairs], axis=1) * np.sqrt(weights)[:, None]
                    for pairs in (sources, targets))
    np.testing.assert_allclose(inner_products(sources, targets), ours.T @ wanted, rtol=1e-9)
    x, residuals = solve_coefficients(sources, targets)
    best = np.linalg.lstsq(ours, wanted, rcond=None)[0]
    np.testing.assert_allclose(x.sum(axis=0), 1, rtol=1e-12)
    np.testing.assert_allclose(x, best / best.sum(axis=0), atol=1e-6)
    left = np.linalg.norm(ours @ x - wanted, axis=0) / np.linalg.norm(wanted, axis=0)
    np.testing.assert_allclose(residuals, left, rtol=1e-6, atol=1e-6)


def test_the_first_average_is_the_unwrapped_module_in_eval_mode(tmp_path):
    module = torch.nn.BatchNorm1d(3)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    wrapped = torch.compile(torch.nn.parallel.DistributedDataParallel(torch.compile(module)))
    torch.distributed.destroy_process_group()
    ema = PowerEMA(wrapped)
    module.weight.data.normal_(), module(torch.randn(5, 3))
    ema.update(wrapped, 1)
    for average in ema.averages.values():
        assert type(average) is torch.nn.BatchNorm1d and not average.training and not average.weight.requires_grad
        assert plain(average.state_dict()) == plain(module.state_dict())


def plain(value):
    """The same with tensors as plain values, to compare."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if name != "sha256"}
    return (str(value.dtype), tuple(value.shape), value.tolist()) if torch.is_tensor(value) else (type(value), value)


def test_a_damaged_or_foreign_file_is_refused_in_one_line(tmp_path):
    path, flips = tmp_path / "a.pt", random.Random(0)
    weights = {"w": torch.arange(6.0).view(3, 2).T, "half": torch.ones(3).bfloat16(), "number": torch.tensor(7)}
    saved = {"step": 3, "names": ["a", "b"], "rate": 0.1, "none": None, "weights": weights}
    save_file(path, saved)
    whole, good = path.read_bytes(), torch.load(path, weights_only=True)

    def refusal(content):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        try:
            assert plain(load_file(path)) == plain(saved)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            return str(error)

    places = [(flips.randrange(len(whole)), 1 << flips.randrange(8)) for _ in range(60)]
    flipped = [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:] for at, bit in places]
    assert refusal(whole) is None and sum(refusal(content) is not None for content in flipped) > 10
    assert "KeyError" in refusal(good)  # its digest is lost
    good |= {"sha256": digest(saved)}
    assert refusal(good) is None  # as older code wrote it
    reshaped = weights | {"w": weights["w"].reshape(3, 2)}
    for content, message in ((whole[:-200], "damaged"), (b"", "damaged"), ([1], "damaged"), ({"code": path}, "damaged"),
                             ({"weights": {}}, "another version"), (good | {"format": 99}, "another version"),
                             (good | {"step": 3.0}, "SHA-256"), (good | {"weights": reshaped}, "SHA-256"),
                             (good | {"weights": weights | {"w": torch.ones(1).expand(9)}}, "larger than its storage")):
        assert message in refusal(content)


def test_snapshots_hold_float16_parameters_and_exact_buffers(tmp_path):
    module = torch.nn.BatchNorm1d(3)
    module.weight.data.normal_(), module.bias.data.fill_(1e-9), module(torch.randn(5, 3))
    path = save_snapshot(tmp_path, module, step=12, std=0.05, info={"model": {"kinds": ["a"]}})
    snapshot = load_file(path)
    assert (snapshot["step"], snapshot["std"], snapshot["info"]) == (12, 0.05, {"model": {"kinds": ["a"]}})
    assert snapshot["buffers"] == ["running_mean", "running_var", "num_batches_tracked"]
    expected = dict(module.state_dict()) | {"weight": module.weight.data.half()}  # 1e-9 is too small for float16
    assert plain(snapshot["weights"]) == plain(expected)
    module.bias.data.fill_(1e6)  # too large for it
    assert load_file(save_snapshot(tmp_path, module, 4, 0.1))["weights"]["bias"].tolist() == [1e6] * 3
    (tmp_path / "0000005-0.050.pt.7.writing").touch(), (tmp_path / "best.pt").touch()
    assert [(step, std) for step, std, _ in list_snapshots(tmp_path)] == [(4, 0.1), (12, 0.05)]


def test_widths_mixed_from_snapshots_agree_with_tracked_ones(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.BatchNorm1d(200)
    ema, direct = PowerEMA(module), PowerEMA(module, stds=(0.075, 0.15))
    for step in range(1, 601):
        module.weight.data.add_(torch.randn(200), alpha=0.1), module(torch.randn(2, 200))
        ema.update(module, step), direct.update(module, step)
        for std in ema.averages if step % 30 == 0 else ():
            save_snapshot(tmp_path, ema.averages[std], step, std)
    for snapshot in reconstruct(load_snapshots(tmp_path), stds=[0.075, 0.15]):
        ours, theirs = snapshot["weights"], direct.averages[snapshot["std"]].state_dict()
        assert torch.dist(ours["weight"], theirs["weight"]) < 1e-3 * theirs["weight"].norm()
        assert torch.equal(ours["running_mean"], theirs["running_mean"]) and snapshot["step"] == 600
    middle, = reconstruct(load_snapshots(tmp_path, step=300), [0.05])  # a tracked one comes back as it is
    saved = load_file(tmp_path / "0000300-0.050.pt")["weights"]["weight"].float()
    torch.testing.assert_close(middle["weights"]["weight"], saved, rtol=1e-4, atol=1e-5)


def test_reconstruction_mixes_tied_parameters_and_warns(tmp_path, capsys):
    module = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)])
    module[1].weight = module[0].weight
    sources, values = [(step, 0.1) for step in (4, 8, 12)], [1.0, 1e-9, 3.0]  # the second in float32
    for (step, std), value in zip(sources, values):
        module[0].weight.data.fill_(value)
        save_snapshot(tmp_path, module, step, std)
    coefficients, residuals = solve_coefficients(sources, [(12, 0.1), (12, 0.2)])
    for snapshot, expected in zip(reconstruct(load_snapshots(tmp_path), [0.1, 0.2]), values @ coefficients):
        first, second = snapshot["weights"].values()
        assert first.item() == second.item() == pytest.approx(expected, rel=1e-5)
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and "EMA width 0.2 is beyond" in warned and f"{residuals[1]:.1%}" in warned


def test_snapshots_that_do_not_fit_together_are_named(tmp_path):
    for step in (4, 8, 12):
        save_snapshot(tmp_path, torch.nn.Linear(3, 3), step, 0.05)
    for module, info in ((torch.nn.Linear(3, 4), None), (torch.nn.Linear(3, 3), {"model": 1})):
        save_snapshot(tmp_path, module, 8, 0.05, info)
        with pytest.raises(ValueError, match="step 8, width 0.05 is from another model than .* step 12, width 0.05"):
            reconstruct(load_snapshots(tmp_path), [0.1])


def test_snapshots_of_two_trainings_are_not_mixed(tmp_path):
    for value, steps in ((5.0, 100), (1.0, 60)):
        module = torch.nn.Linear(2, 2, bias=False)
        ema = PowerEMA(module)
        for step in range(1, steps + 1):
            module.weight.data.fill_(value)
            ema.update(module, step)
            for std in ema.averages if step % 10 == 0 else ():
                save_snapshot(tmp_path, ema.averages[std], step, std)
    ours, = reconstruct(load_snapshots(tmp_path, step=60), [0.15])
    assert ours["weights"]["weight"].mean() == pytest.approx(1)
    with pytest.raises(ValueError, match="step 10, width 0.05 is from another training than the last, of step 100"):
        reconstruct(load_snapshots(tmp_path), [0.15])
    other = PowerEMA(torch.nn.Linear(2, 2, bias=False))
    other.load_state_dict(ema.state_dict())  # resumed, it is the same training
    path = save_snapshot(tmp_path / "other", other.averages[0.05], 60, 0.05)
    assert load_file(path)["training"] == ema.id == other.id


class Odd(torch.nn.Module):
    """Frozen parameters and integers among the parameters, and a wrapper that changes names."""

    def __init__(self):
        super().__init__()
        self.frequencies = torch.nn.Parameter(torch.randn(64) * 16, requires_grad=False)
        self.table = torch.nn.Parameter(torch.arange(3000), requires_grad=False)
        self.trained = checkpoint_wrapper(torch.nn.Linear(2, 2).bfloat16())
        self.frozen = torch.nn.Identity()  # a name that people use

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_what_is_not_averaged_is_exact_whatever_wrappers_call_it(tmp_path):
    module = Odd()
    ema = PowerEMA(module, (0.05, 0.1))
    for step in range(1, 11):
        module.trained.weight.data.fill_(step)
        ema.update(module, step)
        for std, average in ema.averages.items():
            save_snapshot(tmp_path, average, step, std)
    snapshot, = reconstruct(load_snapshots(tmp_path), [0.07])
    assert snapshot["buffers"] == ["frequencies", "table", "_extra_state"]
    assert sorted(snapshot["weights"]) == sorted(module.state_dict())
    for weights in (snapshot["weights"], ema.averages[0.1].state_dict()):
        assert torch.equal(weights["frequencies"], module.frequencies) and torch.equal(weights["table"], module.table)
    weight = snapshot["weights"]["trained.weight"]
    assert weight.dtype == torch.float32 and 6 < weight.min() == weight.max() < 10


def test_modules_that_cannot_be_averaged_are_refused():
    patched, shared, lazy = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2), torch.nn.LazyLinear(2)
    patched[0].forward = torch.compile(patched[0].forward, backend="eager")
    shared.weight.device_mesh = None  # as parameters sharded by FSDP have one
    locked = torch.nn.Linear(2, 2)
    locked.lock = threading.Lock()
    for module, said in ((patched, "the forward of 0 was replaced"), (shared, "weight is sharded"),
                         (lazy, "weight has no shape yet"), (locked, "this Linear cannot be copied: .*lock")):
        with pytest.raises(ValueError, match=f"^{said}[^\n]*$"):
            PowerEMA(module)
    ema = PowerEMA(torch.nn.Linear(2, 2))
    for other in (torch.nn.Linear(2, 3), torch.nn.Linear(2, 2, bias=False), torch.nn.Sequential(torch.nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="not the module that PowerEMA was made of: .*(weight|bias)"):
            ema.update(other, 1)
    module = torch.nn.Linear(2, 2)
    module.forward = torch.compile(module.forward, backend="eager")  # replaced afterwards, as the line advises
    ema.update(module, 1)
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    PowerEMA(frozen).update(frozen, 1)  # nothing to average


def test_batch_statistics_of_an_average_are_renewed_by_update_bn():
    module = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1, affine=False))
    ema = PowerEMA(module, (0.1,))
    for step in range(1, 201):
        module[0].weight.data.fill_(step)
        module(torch.randn(64, 1))
        ema.update(module, step)
    average, x = ema.averages[0.1], torch.randn(4096, 1)
    assert torch.equal(average[1].running_var, module[1].running_var) and abs(average(x).std() - 1) > 0.05
    torch.optim.swa_utils.update_bn(torch.randn(20, 512, 1), average)
    assert average(x).std().item() == pytest.approx(1, rel=0.05)


def test_only_what_can_be_read_again_is_saved(tmp_path):
    module = torch.nn.Linear(2, 2)
    path = save_snapshot(tmp_path, module, np.int64(1), np.float64(0.1), {"rate": 0.5, "names": ["a"], "none": None})
    snapshot = load_file(path)
    assert (snapshot["step"], snapshot["std"]) == (1, 0.1) and type(snapshot["std"]) is float
    for value in (np.float64(0.5), tmp_path, {"a"}, torch.bfloat16, len):
        with pytest.raises(ValueError, match=f"0000002-0.100.pt: holds a {type(value).__name__}"):
            save_snapshot(tmp_path, module, 2, 0.1, {"value": value})
    assert [path.name for path in tmp_path.iterdir()] == ["0000001-0.100.pt"]
