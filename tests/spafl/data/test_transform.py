"""What reaches the model: normalisation, and augmentation against a plain per-image loop."""

import numpy as np
import pytest
import torch

from spafl.data import Transform


def images(n=6, c=3, h=8, w=10, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 256, (n, c, h, w), dtype=np.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_is_bitwise_the_usual_pipeline(dtype, channels):
    mean, std = (0.49, 0.48, 0.44)[:channels], (0.24, 0.25, 0.26)[:channels]
    batch = images(n=32, c=channels, h=28, w=28)
    kept = batch.clone()
    got = Transform(mean, std)(batch, dtype)
    as_column = [torch.tensor(v, dtype=dtype)[:, None, None] for v in (mean, std)]
    assert torch.equal(got, (batch.to(dtype) / 255 - as_column[0]) / as_column[1])
    assert torch.equal(batch, kept)


def test_float_images_are_on_the_unit_scale_already_and_not_overwritten():
    batch = images(c=1).float() / 255
    kept = batch.clone()
    torch.testing.assert_close(Transform((0.5,), (0.25,))(batch), (kept - 0.5) / 0.25)
    assert torch.equal(batch, kept)


def test_without_statistics_values_stay_as_stored():
    assert torch.equal(Transform()(images()), images().float())
    floats = images().float()
    out = Transform()(floats)
    assert torch.equal(out, floats) and out.data_ptr() != floats.data_ptr()


def naive(batch, pad, offset, flip):
    out = torch.zeros_like(batch)
    n, _, h, w = batch.shape
    for i in range(n):
        for y in range(h):
            for x in range(w):
                source_y = y + int(offset[i, 0]) - pad
                source_x = (w - 1 - x if flip[i] else x) + int(offset[i, 1]) - pad
                if 0 <= source_y < h and 0 <= source_x < w:
                    out[i, :, y, x] = batch[i, :, source_y, source_x]
    return out


@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_flip_equal_a_loop_over_images(pad, channels):
    batch = images(n=12, c=channels)
    got = Transform(augment="crop-flip", pad=pad)(batch, generator=torch.Generator().manual_seed(3))
    draw = torch.Generator().manual_seed(3)
    offset = torch.randint(2 * pad + 1, (12, 2), generator=draw)
    flip = torch.randint(2, (12,), generator=draw)
    assert 0 < flip.sum() < 12
    assert torch.equal(got, naive(batch, pad, offset, flip).float())


def test_padding_is_black_before_normalisation():
    transform = Transform((0.5,), (0.25,), augment="crop-flip", pad=4)
    out = transform(torch.full((64, 1, 8, 8), 255, dtype=torch.uint8), generator=torch.Generator().manual_seed(0))
    assert sorted(out.unique().tolist()) == [-2.0, 2.0]


def test_augmentation_covers_all_offsets_and_half_the_flips():
    batch = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).repeat(4000, 1, 1, 1)
    out = Transform(augment="crop-flip", pad=1)(batch, generator=torch.Generator().manual_seed(0))
    centre, counts = out[:, 0, 1, 1].unique(return_counts=True)  # the centre pixel shows the offset
    assert centre.tolist() == list(range(1, 10))
    assert counts.min() > 4000 / 9 * 0.8
    middle = out[out[:, 0, 1, 1] == 5][:, 0, 1, 0]
    assert set(middle.tolist()) == {4.0, 6.0}
    assert 0.4 < (middle == 6).double().mean() < 0.6


def test_only_a_generator_augments_and_its_seed_decides():
    transform = Transform((0.5,) * 3, (0.25,) * 3, augment="crop-flip")
    plain = Transform((0.5,) * 3, (0.25,) * 3)(images())
    assert torch.equal(transform(images()), plain)
    one, two, other = (transform(images(), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other) and not torch.equal(one, plain)


def test_without_augmentation_the_generator_is_not_consumed():
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    Transform((0.5,) * 3, (0.25,) * 3)(images(), generator=generator)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": (0.5,)}, "one value per channel; got 1 and 0"),
        ({"mean": (0.5,), "std": (0.0,)}, "std must be positive"),
        ({"augment": "mixup"}, "augment must be None or 'crop-flip'; got 'mixup'"),
        ({"pad": -1}, "pad must be"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Transform(**arguments)


def test_a_batch_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(n, 1, h, w\); got \(6, 3, 8, 10\)"):
        Transform((0.5,), (0.5,))(images())
    with pytest.raises(ValueError, match="shape"):
        Transform()(images()[0])
