import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spafl.wire import WireError, decode, encode, payload_bytes

MESSAGE = {"conv1.threshold": torch.arange(5.0), "n": torch.tensor(3, dtype=torch.int64), "e": torch.empty(0, 2)}


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.int64]),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(shapes, dtype):
    message = {f"tensor {i}": torch.ones(shape).cumsum(-1).to(dtype) if shape else torch.tensor(2).to(dtype)
               for i, shape in enumerate(shapes)}  # fmt: skip
    back = decode(encode(message))
    assert list(back) == list(message)
    for name, tensor in message.items():
        assert back[name].dtype == dtype and back[name].shape == tensor.shape and torch.equal(back[name], tensor)


def test_payload_counts_tensors_only_and_the_frame_says_the_rest():
    assert payload_bytes(MESSAGE) == 5 * 4 + 8
    assert payload_bytes({}) == 0
    assert len(encode({"t": torch.zeros(580)})) == 580 * 4 + 7 + 2 + 2 + 4 + 4


def test_non_contiguous_tensors_travel_by_value():
    tensor = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(decode(encode({"t": tensor}))["t"], tensor)


@pytest.mark.parametrize("cut", [0, 3, 8, 30, -1])
def test_truncation_is_noticed(cut):
    with pytest.raises(WireError):
        decode(encode(MESSAGE)[:cut])


def test_every_flipped_byte_is_noticed_or_changes_a_name():
    frame = encode(MESSAGE)
    for at in range(len(frame)):
        bad = bytearray(frame)
        bad[at] ^= 0xFF
        try:
            back = decode(bytes(bad))
        except (WireError, UnicodeDecodeError):
            continue
        same = list(back) == list(MESSAGE) and all(
            back[n].dtype == t.dtype and back[n].shape == t.shape and torch.equal(back[n], t)
            for n, t in MESSAGE.items()
        )
        assert not same


def test_trailing_bytes_and_other_versions_are_refused():
    with pytest.raises(WireError):
        decode(encode(MESSAGE) + b"x")
    other = bytearray(encode(MESSAGE))
    other[4] = 9
    with pytest.raises(WireError, match="format version 9"):
        decode(bytes(other))
