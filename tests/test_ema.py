import math

import pytest
import torch

from ema import PowerEMA, gamma_to_std, list_snapshots, load_snapshot, save_atomically, save_snapshot, std_to_gamma


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
        assert gamma_to_std(std_to_gamma(std)) == pytest.approx(std, rel=1e-9)
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
    assert torch.equal(other.weight, module.weight.half().float()) and torch.equal(other.running_mean, module.running_mean)


def test_snapshots_are_listed_oldest_first_and_nothing_else_is(tmp_path):
    for step, std in ((30, 0.1), (4, 0.1), (4, 0.05)):
        save_snapshot(tmp_path, torch.nn.Linear(1, 1), step, std)
    (tmp_path / "0000005-0.050.pt.writing").touch(), (tmp_path / "best.pt").touch()
    assert [(step, std) for step, std, _ in list_snapshots(tmp_path)] == [(4, 0.05), (4, 0.1), (30, 0.1)]
    assert list_snapshots(tmp_path / "nowhere") == []


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "state.pt"
    save_atomically({"step": 1}, path)
    with pytest.raises(Exception):
        save_atomically({"step": 2, "bad": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"step": 1} and list(tmp_path.iterdir()) == [path]


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
