"""The checked merge: bad uploads are left out and told, good ones merged, the server's state never harmed."""

import math

import numpy as np
import pytest
import torch

from spafl.algorithms import BaseOptions, Upload
from spafl.algorithms.aggregate import robust_mean, trimmed_count
from spafl.algorithms.fedavg import FedAvg
from spafl.algorithms.local import Local
from spafl.algorithms.spafl import VARIANTS, SpaFL, SpaFLOptions
from spafl.merge import Reply, TooFewUploads, merge_replies
from spafl.wire import Uplink, encode

ROUND, MODEL = 4, 99
SHAPES = {"conv1.threshold": 3, "fc.threshold": 5}


def spafl(**options):
    return SpaFL(SpaFLOptions(**{**VARIANTS["paper"]["algorithm"], **options}))


def fedavg(**options):
    return FedAvg(FedAvg.Options(**options))


def server_state():
    return {name: torch.linspace(-0.1, 0.1, size) for name, size in SHAPES.items()}


def good(client):
    return {name: t + 0.01 * (client + 1) for name, t in server_state().items()}


def frame(message, round=ROUND, model=MODEL):
    return encode(message, round, model)


def merge(algorithm, replies, min_uploads=1, sampled=(0, 1, 2, 3)):
    server = server_state()
    before = {name: t.clone() for name, t in server.items()}
    sent = {k: algorithm.broadcast(server, ROUND, k) for k in sampled}
    try:
        return merge_replies(algorithm, server, ROUND, sent, replies, Uplink("fp32", MODEL), 4, min_uploads)
    finally:
        assert all(torch.equal(server[name], t) for name, t in before.items()) and server.keys() == before.keys()


def changed(**changes):
    return {**good(1), **{name.replace("_", "."): value for name, value in changes.items()}}


def without(name):
    return {k: v for k, v in good(1).items() if k != name}


NAN = torch.full((5,), math.nan)
BAD = {
    "nan": (frame(changed(fc_threshold=NAN)), "'fc.threshold' has entries that are not finite"),
    "inf": (frame(changed(fc_threshold=torch.tensor([0, 0, 0, 0, math.inf]))), "not finite"),
    "huge": (frame(changed(fc_threshold=torch.full((5,), -3e38))), "an entry of magnitude 3e+38; at most 10000 is"),
    "one entry": (frame(changed(fc_threshold=torch.ones(1))), r"shape (1,); (5,) was expected"),
    "scalar": (frame(changed(fc_threshold=torch.tensor(1.0))), "shape ()"),
    "row": (frame(changed(fc_threshold=torch.ones(1, 5))), "shape (1, 5)"),
    "float64": (frame(changed(fc_threshold=torch.ones(5).double())), "is torch.float64; torch.float32 was expected"),
    "integers": (frame(changed(fc_threshold=torch.ones(5).int())), "is torch.int32"),
    "missing": (frame(without("fc.threshold")), "'fc.threshold' is missing"),
    "extra": (frame(changed(more=torch.ones(2))), "'more' was not asked for"),
    "nothing": (frame({}), "is missing"),
    "late": (frame(good(1), round=ROUND - 1), "of round 4; round 5 was expected"),
    "other model": (frame(good(1), model=98), "another model"),
    "other encoding": (encode(good(1), ROUND, MODEL, "fp16"), "encoding fp16; fp32 was agreed"),
    "cut": (frame(good(1))[:-3], "checksum"),
    "noise": (b"\x80\x04K\x01.", "not a SpaFL message"),
}


@pytest.mark.parametrize("algorithm", [spafl(), fedavg()], ids=["spafl", "fedavg"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_upload_is_left_out_and_told(algorithm, kind):
    bad, said = BAD[kind]
    if algorithm.upload_limit > 1e4:
        said = said.replace("10000", "1e+15")
    honest = [Reply(k, 10, frame(good(k))) for k in (0, 2)]
    got = merge(algorithm, [honest[0], Reply(1, 10, bad), honest[1]])
    alone = merge(algorithm, honest)
    assert got.accepted == (0, 2) and [r.client for r in got.rejected] == [1]
    assert said in got.rejected[0].reason and "\n" not in got.rejected[0].reason
    assert not alone.rejected
    assert all(torch.equal(got.server[name], alone.server[name]) for name in alone.server)


@pytest.mark.parametrize("samples", [0, -5, True, 2.5, "10", None, math.nan, 2**60])
def test_sample_counts_are_checked(samples):
    got = merge(fedavg(), [Reply(0, 10, frame(good(0))), Reply(1, samples, frame(good(1)))])
    assert got.accepted == (0,) and "samples must be a whole number from 1" in got.rejected[0].reason


@pytest.mark.parametrize("client", [4, -1, True, "0", None, 1.0])
def test_who_was_not_sampled_is_not_heard(client):
    got = merge(spafl(), [Reply(0, 10, frame(good(0))), Reply(client, 10, frame(good(1)))])
    assert got.accepted == (0,) and got.rejected[0].reason == "the client was not sampled in this round"


def test_a_second_upload_changes_nothing():
    replies = [Reply(0, 10, frame(good(0))), Reply(1, 10, frame(good(1)))]
    got = merge(spafl(), [*replies, Reply(0, 10, frame(good(2)))])
    once = merge(spafl(), replies)
    assert got.accepted == (0, 1) and got.rejected[0].reason == "a second upload of the same client"
    assert all(torch.equal(got.server[name], once.server[name]) for name in once.server)


def test_a_good_upload_after_a_bad_one_counts():
    got = merge(spafl(), [Reply(0, 10, b"noise"), Reply(0, 10, frame(good(0)))])
    assert got.accepted == (0,) and len(got.rejected) == 1


def test_too_few_stop_the_run_with_the_reasons():
    replies = [Reply(0, 10, frame(good(0))), Reply(1, 10, BAD["nan"][0]), Reply(2, 10, b"")]
    with pytest.raises(TooFewUploads, match=r"round 5: 1 of 4 uploads are good .*min_uploads is 2 \(client 1: tensor "):
        merge(spafl(), replies, min_uploads=2)
    with pytest.raises(TooFewUploads, match="none came"):
        merge(spafl(), [])
    assert merge(spafl(), replies, min_uploads=1).accepted == (0,)


def test_the_order_of_arrival_does_not_matter():
    rng = np.random.default_rng(0)
    uploads = {
        k: {n: torch.from_numpy(rng.normal(size=s).astype(np.float32)) for n, s in SHAPES.items()} for k in range(30)
    }
    outcomes = []
    for order in (range(30), reversed(range(30)), rng.permutation(30).tolist()):
        replies = [Reply(k, k + 1, frame(uploads[k])) for k in order]
        outcomes.append(merge(spafl(), replies, sampled=range(30)).server)
    for other in outcomes[1:]:
        assert all(torch.equal(outcomes[0][name], other[name]) for name in other)


def test_a_method_without_messages_is_checked_too():
    algorithm = Local(BaseOptions())
    got = merge(algorithm, [Reply(0, 3, frame({})), Reply(1, 3, frame({"x": torch.ones(1)})), Reply(2, 0, frame({}))])
    assert got.accepted == (0,) and len(got.rejected) == 2


# -- robust aggregation


@pytest.mark.parametrize(("clients", "trim", "cut"), [(10, 0.1, 1), (30, 0.1, 3), (7, 0.2, 2), (2, 0.4, 0), (1, 0.1, 0),
                                                      (3, 0.49, 1), (100, 0.25, 25)])  # fmt: skip
def test_how_many_are_trimmed(clients, trim, cut):
    assert trimmed_count(clients, trim) == cut


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 9, 10])
def test_robust_means_by_hand(clients):
    values = np.random.default_rng(clients).normal(size=(clients, 2, 3))
    got = robust_mean(torch.from_numpy(values), "median", 0.1)
    np.testing.assert_allclose(got.numpy(), np.median(values, axis=0), rtol=1e-14)
    got = robust_mean(torch.from_numpy(values), "trimmed-mean", 0.25)
    cut = min(math.ceil(clients / 4), (clients - 1) // 2)
    kept = np.sort(values, axis=0)[cut : clients - cut]
    np.testing.assert_allclose(got.numpy(), kept.mean(axis=0), rtol=1e-14)


@pytest.mark.parametrize("algorithm", [spafl, fedavg], ids=["spafl", "fedavg"])
@pytest.mark.parametrize(("aggregation", "hostile"), [("median", 4), ("trimmed-mean", 2)])
@pytest.mark.parametrize("extreme", [9999.0, -9999.0])
def test_extreme_thresholds_of_a_minority_move_nothing(algorithm, aggregation, hostile, extreme):
    """Of ten clients, up to four (median) or two (a fifth trimmed): every entry stays within the honest ones."""
    honest = {k: good(k) for k in range(10 - hostile)}
    attack = {name: torch.full((size,), extreme) for name, size in SHAPES.items()}
    replies = [Reply(k, 10, frame(m)) for k, m in honest.items()]
    replies += [Reply(k, 2**30, frame(attack)) for k in range(10 - hostile, 10)]
    robust = merge(algorithm(aggregation=aggregation, trim=0.2), replies, sampled=range(10)).server
    fooled = merge(algorithm(), replies, sampled=range(10)).server
    for name in SHAPES:
        stack = torch.stack([m[name] for m in honest.values()])
        assert (robust[name] >= stack.amin(0)).all() and (robust[name] <= stack.amax(0)).all()
        assert (fooled[name].abs() > 1000).all()  # the mean is what the attack is for


def test_without_attack_the_robust_means_agree_with_the_mean_of_symmetric_uploads():
    uploads = [Upload(k, {"t.threshold": torch.tensor([0.1 * (k - 2)])}, 10) for k in range(5)]
    for aggregation in ("mean", "median", "trimmed-mean"):
        merged, _ = spafl(aggregation=aggregation).merge({"t.threshold": torch.ones(1)}, 0, uploads, 9)
        assert merged["t.threshold"].item() == pytest.approx(0.0, abs=1e-7)
        assert merged["t.delta"].item() == pytest.approx(-1.0)


# -- lossy encodings


@pytest.mark.parametrize("encoding", ["fp16", "int8"])
def test_lossy_uploads_lose_nothing_in_the_long_run(encoding):
    """Error feedback: the sum of what arrived differs from the sum of what was meant by one round's error at most."""
    uplink = Uplink(encoding, MODEL)
    rng = np.random.default_rng(1)
    server = server_state()
    memory = uplink.client_state([server])
    assert set(memory) == {"feedback.conv1.threshold", "feedback.fc.threshold"}
    meant = {name: torch.zeros(size, dtype=torch.float64) for name, size in SHAPES.items()}
    arrived = {name: torch.zeros(size, dtype=torch.float64) for name, size in SHAPES.items()}
    for round in range(200):
        upload = {n: t + torch.from_numpy(rng.normal(0.3, 1, t.shape).astype(np.float32)) for n, t in server.items()}
        packed = uplink.pack(upload, encode(server), round, memory, rng)
        got = uplink.unpack(packed, server, round)
        assert got.payload == sum(4 + size * (2 if encoding == "fp16" else 1) for size in SHAPES.values())
        for name in SHAPES:
            meant[name] += upload[name].double() - server[name].double()
            arrived[name] += got.message[name].double() - server[name].double()
    for name in SHAPES:
        gap = (meant[name] - arrived[name]).abs().max().item()
        assert gap < 4.5 / 127 + 1e-4  # one step of the largest difference
        assert (meant[name] - arrived[name] - memory["feedback." + name].double()).abs().max() < 1e-4


def test_parts_of_different_sizes_share_a_layout():
    uplink = Uplink("int8", MODEL)
    small, large = {"w": torch.ones(2, 3), "m": torch.ones(2).bool()}, {"w": torch.ones(4, 3)}
    memory = uplink.client_state([small, large])
    assert {name: t.shape for name, t in memory.items()} == {"feedback.w": (12,)}
    uplink.pack({"w": torch.rand(2, 3)}, encode(small), 0, memory, np.random.default_rng(0))
    assert memory["feedback.w"][:6].any() and not memory["feedback.w"][6:].any()
    with pytest.raises(ValueError, match="no room for tensor 'other'"):
        uplink.pack({"other": torch.rand(2)}, encode({}), 0, memory, np.random.default_rng(0))


def test_the_reference_is_only_what_fits():
    """A tensor whose counterpart has another shape or dtype travels itself."""
    uplink = Uplink("fp16", MODEL)
    memory = {"feedback.w": torch.zeros(4)}
    upload = {"w": torch.rand(4)}
    for sent in ({}, {"w": torch.ones(2, 2)}, {"w": torch.ones(4).double()}):
        frame = uplink.pack(upload, encode(sent), 0, {"feedback.w": torch.zeros(4)}, np.random.default_rng(0))
        assert torch.allclose(uplink.unpack(frame, sent, 0).message["w"], upload["w"], atol=1e-3)
    bad = uplink.pack({"w": torch.full((4,), math.nan)}, encode({}), 0, memory, np.random.default_rng(0))
    assert uplink.unpack(bad, {}, 0).message["w"].isnan().all() and not memory["feedback.w"].any()
