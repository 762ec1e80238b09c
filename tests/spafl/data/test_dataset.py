"""The registry, the digits that ship with scikit-learn, and synthetic data."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from spafl.data import DATASETS, DataError, Dataset, Transform, dataset_options, load_dataset, register_dataset
from spafl.data.builtin import enlarge


@pytest.mark.parametrize("image", [28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_digits_shapes_balance_and_statistics(image, channels):
    digits = load_dataset("digits", image=image, channels=channels)
    assert digits.train_x.shape == (1442, channels, image, image) and digits.train_x.dtype == np.uint8
    assert digits.test_x.shape == (355, channels, image, image)
    assert digits.shape == (channels, image, image) and digits.classes == 10
    for y, low, high in ((digits.train_y, 139, 147), (digits.test_y, 34, 36)):
        counts = np.bincount(y, minlength=10)
        assert counts.min() >= low and counts.max() <= high
    batch = digits.transform(torch.from_numpy(digits.train_x), torch.float64)
    assert abs(batch.mean()) < 1e-10
    assert abs(batch.std() - 1) < 1e-5
    assert (digits.train_x == digits.train_x[:, :1]).all()


def test_digits_split_keeps_every_image_once():
    digits = load_dataset("digits")
    stored = enlarge(load_digits().images.astype(int), 28, white=16)
    both = np.concatenate([digits.train_x, digits.test_x])[:, 0]
    assert sorted(map(bytes, both)) == sorted(map(bytes, stored))
    fives = stored[load_digits().target == 5]
    assert np.array_equal(digits.test_x[digits.test_y == 5, 0], fives[4::5])


@pytest.mark.parametrize("size", [28, 32, 11])
def test_enlargement_is_bilinear(size):
    images = load_digits().images[:200]
    expected = torch.nn.functional.interpolate(torch.from_numpy(images)[:, None], size=(size, size), mode="bilinear")
    got = enlarge(images.astype(int), size, white=16)
    assert got.max() == 255 or size < 28
    assert np.abs(got - expected[:, 0].numpy() * 255 / 16).max() < 0.5 + 1e-9


def test_synthetic_has_the_shape_asked_for_and_repeats():
    options = {"image": 30, "channels": 2, "classes": 7, "train": 1500, "test": 50, "seed": 3}
    one, two = load_dataset("synthetic", **options), load_dataset("synthetic", **options)
    assert one.train_x.shape == (1500, 2, 30, 30) and one.test_x.shape == (50, 2, 30, 30)
    assert np.array_equal(one.train_x, two.train_x) and np.array_equal(one.test_y, two.test_y)
    counts = np.bincount(one.train_y, minlength=7)
    assert counts.max() - counts.min() <= 1
    assert not np.array_equal(one.train_x, load_dataset("synthetic", **{**options, "seed": 4}).train_x)
    assert one.train_x.max() <= 255 and one.train_x.max() > 240  # no overflow wraps around


def test_synthetic_can_be_learned():
    data = load_dataset("synthetic", train=500, test=200)
    x, y = data.transform(torch.from_numpy(data.train_x)).flatten(1), data.train_y
    centres = torch.stack([x[y == c].mean(0) for c in range(10)])
    distance = torch.cdist(data.transform(torch.from_numpy(data.test_x)).flatten(1), centres)
    assert (distance.argmin(1).numpy() == data.test_y).mean() > 0.9


def test_a_data_set_can_be_registered_and_its_options_are_checked():
    def load(root, *, size: int = 2) -> Dataset:
        x, y = np.zeros((size, 1, 4, 4), np.float32), np.zeros(size, np.int64)
        return Dataset("toy", x, y, x, y, 1, Transform((0.5,), (1.0,)))

    register_dataset("toy", load)
    try:
        assert dataset_options("toy") == {"size": 2}
        assert len(load_dataset("toy", size=5).train_y) == 5
        assert load_dataset("toy").transform.augment is None
        assert load_dataset("toy", augment="crop-flip").transform.augment == "crop-flip"
        with pytest.raises(ValueError, match="'toy' exists already"):
            register_dataset("toy", load)
        with pytest.raises(DataError, match=r"no option 'sise' \(did you mean 'size'\?\); options: size"):
            load_dataset("toy", sise=3)
        for wrong in (True, "3", 3.0):
            with pytest.raises(DataError, match="size of data set 'toy' must be int; got"):
                load_dataset("toy", size=wrong)
    finally:
        del DATASETS["toy"]


def test_pixels_are_standardised_scaled_or_left():
    def seen(pixels, **options):
        digits = load_dataset("digits", channels=3, pixels=pixels, **options)
        raw = torch.from_numpy(digits.train_x)
        return raw.double(), digits.transform(raw, torch.float64)

    raw, standard = seen("standard")
    assert abs(standard.mean()) < 1e-10 and torch.equal(standard, seen(None)[1])
    assert torch.equal(seen("unit")[1], raw / 255)
    assert torch.equal(seen("raw")[1], raw)
    assert load_dataset("digits", pixels="raw", augment="crop-flip").transform.augment == "crop-flip"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnits", {}, r"unknown data set 'mnits' \(did you mean 'mnist'\?\); known: digits"),
        ("digits", {"image": 30}, "image must be 28 or 32; got 30"),
        ("digits", {"channels": 2}, "channels must be 1 or 3; got 2"),
        ("digits", {"pixels": "bytes"}, "pixels must be one of standard, unit, raw; got 'bytes'"),
        ("digits", {"augment": "cutout"}, "augment must be 'none' or 'crop-flip'; got 'cutout'"),
        ("synthetic", {"classes": 0}, "classes must be 1 or more; got 0"),
        ("synthetic", {"seed": -1}, "seed must be 0 or more; got -1"),
    ],
)
def test_bad_options_are_one_line(name, options, message):
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(name, **options)
    assert "\n" not in str(caught.value)


X, Y = np.zeros((3, 1, 4, 4), np.uint8), np.array([0, 1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_x": X.astype(float)}, "train_x must be uint8 or float32"),
        ({"test_x": X[0]}, "test_x must be"),
        ({"train_y": Y[:2]}, r"train_y must be int64 \(3,\)"),
        ({"test_y": Y.astype(np.int32)}, "test_y must be int64"),
        ({"train_y": Y + 1}, r"train labels must be 0..1; got 1..2"),
        ({"test_x": X[:, :, :2]}, "differ in shape"),
        ({"test_x": X[:0], "test_y": Y[:0]}, "test part is empty"),
        ({"transform": Transform((0.5,) * 3, (0.5,) * 3)}, "transform is for 3 channels; images have 1"),
    ],
)
def test_an_inconsistent_data_set_is_refused(changes, message):
    good = {"train_x": X, "train_y": Y, "test_x": X, "test_y": Y, "classes": 2, "transform": Transform()}
    Dataset("good", **good)
    with pytest.raises(DataError, match=message):
        Dataset("bad", **{**good, **changes})
