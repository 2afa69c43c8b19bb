import numpy as np
import pytest
import torch

from conftest import ROOT
from data import Dataset, batch_indices, load_dataset, to_network, to_uint8


def test_digits_are_the_1797_uci_images():
    digits = load_dataset("digits")
    raw = np.load(ROOT / "datasets" / "digits.npz", allow_pickle=False)
    assert digits.images.shape == (1797, 1, 8, 8) and digits.images.dtype == torch.uint8
    assert digits.labels.dtype == torch.int64 and digits.labels.bincount().tolist() == np.bincount(raw["labels"]).tolist()
    np.testing.assert_array_equal(np.round(digits.images[:, 0].numpy() / 255 * 16), raw["images"])      # nothing is lost
    assert (digits.images.min(), digits.images.max()) == (0, 255)


def test_what_the_network_sees_has_mean_0_and_std_half_and_can_be_undone():
    digits = load_dataset("digits")
    assert digits.mean == pytest.approx(digits.images.double().mean().item(), rel=1e-12)
    assert digits.std == pytest.approx(digits.images.double().std(correction=0).item(), rel=1e-12)
    x, labels = digits.batch(torch.arange(1797))
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 0.5) < 1e-3 and x.dtype == torch.float32
    assert torch.equal(to_uint8(x, digits.stats), digits.images) and torch.equal(labels, digits.labels)


def test_values_outside_the_range_are_clipped():
    stats = {"mean": 100.0, "std": 50.0}
    assert to_uint8(torch.tensor([-9.0, 0.0, 9.0]), stats).tolist() == [0, 100, 255]
    assert to_network(torch.tensor([100, 150], dtype=torch.uint8), stats).tolist() == [0.0, 0.5]


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    seen = batch_indices(97, seed=3, start=0, count=97 * 3).view(3, 97)
    for epoch in seen:
        assert epoch.sort().values.tolist() == list(range(97))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], batch_indices(97, 4, 0, 97))


def test_order_does_not_depend_on_how_it_is_asked_for():
    whole = batch_indices(97, seed=0, start=0, count=500)
    pieces = [batch_indices(97, seed=0, start=start, count=20) for start in range(0, 500, 20)]
    assert torch.equal(torch.cat(pieces), whole)


def test_unknown_dataset_names_those_there_are():
    with pytest.raises(ValueError, match="no 'digit'; there is digits"):
        load_dataset("digit")


def test_stats_survive_a_move():
    small = Dataset(torch.randint(0, 255, (4, 3, 2, 2), dtype=torch.uint8), torch.zeros(4, dtype=torch.long), 1)
    assert small.to("cpu").stats == small.stats and len(small) == 4
