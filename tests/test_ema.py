import math

import numpy as np
import pytest
import torch

from ema import (PowerEMA, atomic_file, check_fit, find_snapshot, gamma_to_std, inner_products, list_snapshots, load_snapshot,
                 reconstruct, save_snapshot, solve_coefficients, std_to_gamma)


def tracked(values, std):
    """The average of a one-parameter module that takes these values, one a step."""
    module = torch.nn.Linear(1, 1, bias=False).double()
    ema = PowerEMA(module, stds=(std,))
    for step, value in enumerate(values, 1):
        module.weight.data.fill_(value)
        ema.update(module, step)
    return ema.averages[std].weight.item()


@pytest.mark.parametrize("std", [0.05, 0.10, 0.25])
def test_average_weighs_step_s_by_the_power_function(std):
    """Unit impulses read the weights off: each is the integral of the profile t^gamma over the step that leads to s."""
    steps, gamma = 60, std_to_gamma(std)
    for at in range(1, steps + 1):
        weight = tracked([float(s == at) for s in range(1, steps + 1)], std)
        assert weight == pytest.approx((at / steps) ** (gamma + 1) - ((at - 1) / steps) ** (gamma + 1), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("std", [0.05, 0.10])
def test_profile_has_the_width_it_is_named_after(std):
    """Averages of s and s² give the mean and spread of the weights without knowing them."""
    steps = 2000
    mean = tracked([s / steps for s in range(1, steps + 1)], std)
    square = tracked([(s / steps) ** 2 for s in range(1, steps + 1)], std)
    assert math.sqrt(square - mean**2) == pytest.approx(std, rel=0.01)


def test_width_and_exponent_are_inverses():
    assert std_to_gamma(0.10) == pytest.approx(6.94, abs=0.01) and std_to_gamma(0.05) == pytest.approx(16.97, abs=0.01)
    for std in torch.linspace(0.005, 0.28, 50).tolist():
        assert gamma_to_std(std_to_gamma(std)) == pytest.approx(std, rel=1e-12)
    for wrong in (0, -0.1, 0.289, math.nan):
        with pytest.raises(ValueError, match="between 0 and 0.289"):
            std_to_gamma(wrong)


def test_first_average_is_the_module_itself_and_buffers_follow():
    module = torch.nn.BatchNorm1d(3)
    ema = PowerEMA(module)
    module.weight.data.normal_(), module(torch.randn(5, 3))
    ema.update(module, 1)
    for average in ema.averages.values():
        assert torch.equal(average.weight, module.weight) and torch.equal(average.running_mean, module.running_mean)
        assert not average.training and not average.weight.requires_grad


def test_snapshots_come_back_with_parameters_rounded_to_float16_and_buffers_exact(tmp_path):
    module = torch.nn.BatchNorm1d(3)
    module.weight.data.normal_(), module(torch.randn(5, 3))
    path = save_snapshot(tmp_path, module, step=12, std=0.05, info={"model": {"kinds": ["a"]}})
    assert path.name == "0000012-0.050.pt" and torch.load(path, weights_only=True)["weights"]["weight"].dtype == torch.float16
    snapshot = load_snapshot(path)
    assert (snapshot["step"], snapshot["std"], snapshot["info"]) == (12, 0.05, {"model": {"kinds": ["a"]}})
    other = torch.nn.BatchNorm1d(3)
    other.load_state_dict(snapshot["weights"])
    assert snapshot["buffers"] == ["running_mean", "running_var", "num_batches_tracked"]
    assert torch.equal(other.weight, module.weight.half().float()) and torch.equal(other.running_mean, module.running_mean)


def test_snapshots_are_listed_oldest_first_and_nothing_else_is(tmp_path):
    for step, std in ((30, 0.1), (4, 0.1), (4, 0.05)):
        save_snapshot(tmp_path, torch.nn.Linear(1, 1), step, std)
    (tmp_path / "0000005-0.050.pt.writing").touch(), (tmp_path / "best.pt").touch()
    assert [(step, std) for step, std, _ in list_snapshots(tmp_path)] == [(4, 0.05), (4, 0.1), (30, 0.1)]
    assert list_snapshots(tmp_path / "nowhere") == []


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "state.pt"
    with atomic_file(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError):
        with atomic_file(path) as file:
            file.write(b"ne")
            raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_state_goes_on_where_it_stopped():
    torch.manual_seed(0)
    module, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    ema, resumed = PowerEMA(module), PowerEMA(other)
    for step in range(1, 9):
        module.weight.data.normal_()
        ema.update(module, step)
        if step == 4:
            resumed.load_state_dict(ema.state_dict())
        if step > 4:
            resumed.update(module, step)
    for std in ema.averages:
        assert torch.equal(ema.averages[std].weight, resumed.averages[std].weight)


def test_inner_products_agree_with_quadrature():
    """Profiles (gamma + 1)·(t / step)^gamma / step on 0..step; the common part integrated after t = step·u."""
    profiles = [(steps, std) for steps in (100.0, 130.0, 700.0) for std in (0.02, 0.05, 0.10, 0.25)]
    nodes, weights = np.polynomial.legendre.leggauss(200)
    nodes, weights = (nodes + 1) / 2, weights / 2

    def profile(t, step, std):
        gamma = std_to_gamma(std)
        return (gamma + 1) * (t / step) ** gamma / step

    ours = inner_products(profiles, profiles)
    for i, a in enumerate(profiles):
        for j, b in enumerate(profiles):
            end = min(a[0], b[0])
            t = end * nodes**4                                              # non-integer powers are smooth in u = t^(1/4)
            integral = (weights * 4 * nodes**3 * end * profile(t, *a) * profile(t, *b)).sum()
            assert ours[i, j] == pytest.approx(integral, rel=1e-9)


def test_coefficients_are_the_best_fit_and_sum_to_1():
    sources = [(step, std) for step in range(100, 2001, 100) for std in (0.05, 0.10)]
    targets = [(2000, 0.03), (2000, 0.15), (1500, 0.10)]
    x, residuals = solve_coefficients(sources, targets)
    np.testing.assert_allclose(x.sum(axis=0), 1, rtol=1e-12)
    expected = np.zeros(len(sources))
    expected[sources.index((1500, 0.10))] = 1                               # a tracked profile is its own best fit
    np.testing.assert_allclose(x[:, 2], expected, atol=1e-8)
    # independently: least squares on a grid of times
    t = (np.arange(40000) + 0.5) / 20
    curves = np.stack([(std_to_gamma(std) + 1) * (t / step) ** std_to_gamma(std) / step * (t <= step) for step, std in sources + targets])
    best = np.linalg.lstsq(curves[:len(sources)].T, curves[len(sources):].T, rcond=None)[0]
    np.testing.assert_allclose(x[:, :2], (best / best.sum(axis=0))[:, :2], atol=2e-3)
    left = np.linalg.norm(curves[:len(sources)].T @ x - curves[len(sources):].T, axis=0) / np.linalg.norm(curves[len(sources):], axis=1)
    np.testing.assert_allclose(residuals[:2], left[:2], rtol=1e-2)
    assert residuals[2] < 1e-6


@pytest.mark.parametrize("count, dtype, bound", [(20, torch.float16, 1e-3), (50, torch.float32, 2e-4)])
def test_a_toy_model_of_another_kind_reconstructs_widths_that_were_tracked_for_comparison(tmp_path, count, dtype, bound):
    """The example of the docstring: logistic regression, with its own loop."""
    torch.manual_seed(0)
    x = torch.randn(256, 20)
    y = (x @ torch.randn(20, 3)).argmax(1)
    model, steps = torch.nn.Sequential(torch.nn.BatchNorm1d(20), torch.nn.Linear(20, 3)), 600
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    ema, direct = PowerEMA(model), PowerEMA(model, stds=(0.075, 0.15))
    for step in range(1, steps + 1):
        pick = torch.randint(256, (32,))
        torch.nn.functional.cross_entropy(model(x[pick]), y[pick]).backward()
        optimizer.step(), optimizer.zero_grad()
        ema.update(model, step), direct.update(model, step)
        if step % (steps // count) == 0:
            for std, average in ema.averages.items():
                save_snapshot(tmp_path / "ema", average, step, std, dtype=dtype)
    seen = []
    for snapshot in reconstruct(tmp_path / "ema", stds=[0.075, 0.15], progress=lambda *numbers: seen.append(numbers)):
        model.load_state_dict(snapshot["weights"])
        ours, theirs = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in (model, direct.averages[snapshot["std"]]))
        assert (ours - theirs).norm() / theirs.norm() < bound and snapshot["step"] == steps
        assert model[0].num_batches_tracked == steps and snapshot["residual"] < 0.03
    assert seen == [(i, 2 * count) for i in range(1, 2 * count + 1)]
    middle, = reconstruct(tmp_path / "ema", [0.05], step=steps // 2)        # a tracked one comes back as it is
    tracked = load_snapshot(tmp_path / "ema" / f"{steps // 2:07d}-0.050.pt")["weights"]["1.weight"].float()
    torch.testing.assert_close(middle["weights"]["1.weight"], tracked, rtol=1e-4, atol=1e-5)


def test_widths_beyond_the_snapshots_are_warned_of(tmp_path, capsys):
    sources = [(step, std) for step in (50, 100) for std in (0.05, 0.10)]
    residuals = solve_coefficients(sources, [(100, 0.05), (100, 0.28)])[1]
    for std, residual in zip((0.05, 0.28), residuals):
        check_fit({"std": std, "residual": residual})
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and "EMA width 0.28 is beyond" in warned and f"{residuals[1]:.1%} off" in warned
    check_fit({"std": 0.05})
    assert capsys.readouterr().err == ""


def test_rounding_that_large_coefficients_blow_up_is_warned_of(tmp_path, capsys):
    for dtype, warnings in ((torch.float16, 1), (torch.float32, 0)):
        for step in range(1, 101):
            for std in (0.05, 0.10):
                save_snapshot(tmp_path, torch.nn.Linear(2, 2), step, std, dtype=dtype)
        check_fit(reconstruct(tmp_path, [0.01])[0])
        assert capsys.readouterr().err.count("save them in float32") == warnings


def test_tied_parameters_are_mixed_under_both_names(tmp_path):
    module = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)])
    module[1].weight = module[0].weight
    for step in (4, 8, 12):
        module[0].weight.data.fill_(float(step))
        save_snapshot(tmp_path, module, step, 0.10)
    weights = reconstruct(tmp_path, [0.15])[0]["weights"]
    assert torch.equal(weights["0.weight"], weights["1.weight"]) and weights["0.weight"].item() < 11.9


def test_find_snapshot_prefers_what_was_tracked(tmp_path):
    for step in (4, 8):
        for std in (0.05, 0.10):
            save_snapshot(tmp_path, torch.nn.Linear(2, 2), step, std)
    assert find_snapshot(tmp_path).name == "0000008-0.100.pt" and find_snapshot(tmp_path, 0.05).name == "0000008-0.050.pt"
    path = find_snapshot(tmp_path, 0.08)
    assert path == tmp_path / "posthoc" / "0000008-0.080.pt" and load_snapshot(path)["weights"]["weight"].dtype == torch.float32
    assert len(list_snapshots(tmp_path)) == 4                               # a reconstruction is no source of others


def test_snapshots_that_cannot_be_used_are_named(tmp_path):
    for step in (4, 8, 12):
        save_snapshot(tmp_path, torch.nn.Linear(3, 3), step, 0.05)
    with pytest.raises(ValueError, match="no snapshot at step 9; the nearest is at 8"):
        reconstruct(tmp_path, [0.1], step=9)
    for wrong in (0.3, 0.0, 0.0512):
        with pytest.raises(ValueError, match="an EMA width"):
            find_snapshot(tmp_path, wrong)
    save_snapshot(tmp_path, torch.nn.Linear(3, 4), 8, 0.05)
    with pytest.raises(ValueError, match="0000008-0.050.pt: is of another model than .*0000004-0.050.pt"):
        reconstruct(tmp_path, [0.1])
    path = tmp_path / "0000004-0.050.pt"
    for damage in (path.read_bytes()[:-200], b"", b"hello", path.read_bytes()[:50]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="0000004-0.050.pt: damaged"):
            reconstruct(tmp_path, [0.1])
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="0000004-0.050.pt: not an EMA snapshot"):
        reconstruct(tmp_path, [0.1])
    with pytest.raises(ValueError, match="there are no snapshots"):
        reconstruct(tmp_path / "nowhere", [0.1])
