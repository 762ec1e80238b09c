"""Partitions: whatever is asked, every sample has one owner and no client is left empty."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spafl.data import SCHEMES, PartitionError, Scheme, partition, register_scheme


def labels(n, classes, seed=0):
    return np.random.default_rng(seed).integers(0, classes, n)


def rng(seed=0):
    return np.random.default_rng(seed)


def check(made, train_y, test_y, clients, min_train=1, min_test=1):
    assert made.clients == clients == len(made.test)
    for parts, y, least in ((made.train, train_y, min_train), (made.test, test_y, min_test)):
        together = np.concatenate(parts)
        assert np.array_equal(np.sort(together), np.arange(len(y)))  # disjoint and complete
        assert min(map(len, parts)) >= least
        assert all((np.diff(part) > 0).all() for part in parts)  # sorted


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_every_request_that_is_possible_is_met(data):
    clients = data.draw(st.integers(1, 12), "clients")
    classes = data.draw(st.integers(1, 6), "classes")
    least = data.draw(st.integers(1, 6), "min_train"), data.draw(st.integers(0, 3), "min_test")
    seed = data.draw(st.integers(0, 1000), "seed")
    sizes = [max(1, clients * m) + data.draw(st.integers(0, 60)) for m in least]
    y = labels(sizes[0], classes, seed), labels(sizes[1], classes, seed + 1)
    present = len(np.union1d(*y))
    scheme = data.draw(st.sampled_from(["iid", "dirichlet", "pathological", "size"]), "scheme")
    options = {}
    if scheme in ("dirichlet", "size"):
        options["alpha"] = data.draw(st.sampled_from([0.001, 0.01, 0.1, 1.0, 100.0]), "alpha")
    if scheme == "pathological":
        options["classes_per_client"] = data.draw(st.integers(-(-present // clients), present), "k")
    options |= {"min_train": least[0], "min_test": least[1], "max_draws": data.draw(st.integers(1, 4), "draws")}
    made = partition(*y, scheme, clients, rng(seed), **options)
    check(made, *y, clients, *least)
    again = partition(*y, scheme, clients, rng(seed), **options)
    assert all(np.array_equal(a, b) for a, b in zip(made.train + made.test, again.train + again.test))
    assert made.draws <= options["max_draws"]


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("iid", {}), ("dirichlet", {"alpha": 0.5}), ("pathological", {"classes_per_client": 3}), ("size", {"alpha": 1.0})],
)
def test_another_seed_is_another_partition(scheme, options):
    y = labels(500, 10), labels(200, 10)
    one, two = (partition(*y, scheme, 5, rng(seed), **options) for seed in (1, 2))
    assert not all(np.array_equal(a, b) for a, b in zip(one.train, two.train))


def test_iid_shares_are_equal():
    made = partition(labels(103, 10), labels(21, 10), "iid", 10, rng())
    assert sorted(map(len, made.train)) == [10] * 7 + [11] * 3
    assert sorted(map(len, made.test)) == [2] * 9 + [3]


def test_dirichlet_cuts_each_class_where_its_definition_says():
    """The published rule, written out: shuffle a class, split it at int(cumsum(p) * n), the same p for test."""
    y = labels(3000, 4, 1), labels(1000, 4, 2)
    made = partition(*y, "dirichlet", 8, rng(5), alpha=0.4, min_test=0)
    assert made.draws == 1 and made.moved == (0, 0)
    draw = rng(5)
    train, test = [[] for _ in range(8)], [[] for _ in range(8)]
    for label in range(4):
        shares = draw.dirichlet([0.4] * 8)
        for parts, part_y in ((train, y[0]), (test, y[1])):
            index = draw.permutation(np.flatnonzero(part_y == label))
            for part, piece in zip(parts, np.split(index, (np.cumsum(shares) * len(index)).astype(int)[:-1])):
                part.extend(piece)
    assert [sorted(part) for part in train] == [part.tolist() for part in made.train]
    assert [sorted(part) for part in test] == [part.tolist() for part in made.test]


def test_dirichlet_test_parts_follow_the_train_parts():
    y = labels(20000, 10, 1), labels(10000, 10, 2)
    made = partition(*y, "dirichlet", 10, rng(), alpha=0.3)
    train, test = made.counts(y[0], 10), made.counts(y[1], 10, "test")
    assert train.shape == (10, 10) and train.sum() == 20000 and test.sum() == 10000
    # cut at whole samples of classes of 2,000 and 1,000: shares agree to about one sample
    assert np.abs(train / train.sum(0) - test / test.sum(0)).max() < 0.0021


def test_small_alpha_is_more_uneven_than_large():
    y = labels(5000, 10, 1), labels(1000, 10, 2)
    held = [
        (partition(*y, "dirichlet", 20, rng(), alpha=a).counts(y[0], 10) > 0).sum(1).mean() for a in (0.05, 0.5, 50)
    ]
    assert held[0] < 4 < held[1] < held[2] == 10


@pytest.mark.parametrize("alpha", [0.01, 0.001])
@pytest.mark.parametrize("scheme", ["dirichlet", "size"])
def test_tiny_alpha_ends_by_repair(scheme, alpha):
    y = labels(2000, 10, 1), labels(500, 10, 2)
    made = partition(*y, scheme, 50, rng(), alpha=alpha, min_train=5, max_draws=3)
    check(made, *y, 50, 5, 1)
    assert made.draws == 3 and min(made.moved) > 0


def test_repair_moves_no_more_than_is_lacking_and_prefers_the_clients_own_classes():
    y = labels(600, 10, 1), labels(300, 10, 2)
    raw = partition(*y, "dirichlet", 20, rng(3), alpha=0.05, min_train=1, min_test=0, max_draws=1)
    made = partition(*y, "dirichlet", 20, rng(3), alpha=0.05, min_train=12, min_test=0, max_draws=1)
    before = raw.counts(y[0], 10)
    lacking = np.maximum(12 - before.sum(1), 0)
    assert made.moved[0] >= lacking.sum() - raw.moved[0]
    after = made.counts(y[0], 10)
    poor = before.sum(1) < 12
    assert (after[poor].sum(1) == 12).all() and poor.any()
    assert (after[~poor] <= before[~poor]).all()


def repaired_by_looking_everywhere(labels, owners, clients, minimum):
    """The rule of the repair, written out: every donor of every sample is looked for in the whole table."""
    classes = 1 + max(int(y.max()) for y in labels)
    liked, moved = None, []
    for y, owner, least in zip(labels, owners, minimum):
        table = np.bincount(owner * classes + y, minlength=clients * classes).reshape(clients, classes)
        likes = table > 0 if liked is None else liked
        before = owner.copy()
        for receiver in np.flatnonzero(table.sum(1) < least):
            while (lack := least - table[receiver].sum()) > 0:
                total = table.sum(1)
                own = np.where(likes[receiver], table, 0)
                if not ((total > least) & own.any(1)).any():
                    own = table
                donor = int(np.where((total > least) & own.any(1), total, -1).argmax())
                label = int(own[donor].argmax())
                amount = int(min(lack, total[donor] - least, table[donor, label]))
                owner[np.flatnonzero((owner == donor) & (y == label))[-amount:]] = receiver
                table[donor, label] -= amount
                table[receiver, label] += amount
        moved.append(int((owner != before).sum()))
        liked = table > 0
    return tuple(moved)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_repair_moves_the_samples_that_its_rule_names(data):
    """Recorded partitions depend on it, sample by sample."""
    clients, classes = data.draw(st.integers(1, 30), "clients"), data.draw(st.integers(1, 8), "classes")
    minimum = data.draw(st.integers(1, 5), "min_train"), data.draw(st.integers(0, 3), "min_test")
    draw = rng(data.draw(st.integers(0, 10_000), "seed"))
    sizes = [max(1, clients * least) + data.draw(st.integers(0, 80)) for least in minimum]
    y = tuple(np.sort(draw.integers(0, classes, n)) if n % 2 else draw.integers(0, classes, n) for n in sizes)
    owners = tuple(np.minimum(draw.geometric(0.2, n) - 1, clients - 1) for n in sizes)
    expected = tuple(owner.copy() for owner in owners)
    moved = repaired_by_looking_everywhere(y, expected, clients, minimum)
    register_scheme("hand", Scheme(lambda labels, clients, rng: tuple(owner.copy() for owner in owners)))
    try:
        made = partition(*y, "hand", clients, rng(), min_train=minimum[0], min_test=minimum[1], max_draws=1)
    finally:
        del SCHEMES["hand"]
    assert made.moved == moved
    for parts, owner in zip((made.train, made.test), expected):
        assert all(np.array_equal(part, np.flatnonzero(owner == k)) for k, part in enumerate(parts))


def test_ten_thousand_clients_are_cut_without_looking_everywhere():
    """The rule written out takes four seconds and more."""
    y = labels(60_000, 10, 1), labels(10_000, 10, 2)
    begin = time.process_time()
    made = partition(*y, "dirichlet", 10_000, rng(), alpha=0.2, max_draws=3)
    assert time.process_time() - begin < 1.5
    assert made.moved[1] > 3000 and min(map(len, made.test)) == 1


def test_repaired_test_parts_follow_training_classes():
    train_y = np.repeat([0, 1], 50)
    test_y = np.repeat([0, 1], 10)

    def draw(labels, clients, rng):
        train = np.repeat([0, 1, 2], [50, 25, 25])  # client 0 has class 0; 1 and 2 share class 1
        return train, np.repeat([0, 1], 10)  # client 2 has no test sample

    register_scheme("hand", Scheme(draw))
    try:
        made = partition(train_y, test_y, "hand", 3, rng(), max_draws=5)
    finally:
        del SCHEMES["hand"]
    assert made.draws == 5 and made.moved == (0, 1)
    assert made.counts(test_y, 2, "test").tolist() == [[10, 0], [0, 9], [0, 1]]
    assert made.test[2].tolist() == [19]


def test_pathological_gives_each_client_its_classes_and_shares_them():
    y = labels(5000, 10, 1), labels(1000, 10, 2)
    made = partition(*y, "pathological", 20, rng(), classes_per_client=2)
    train, test = made.counts(y[0], 10), made.counts(y[1], 10, "test")
    assert ((train > 0).sum(1) == 2).all()
    assert np.array_equal(train > 0, test > 0)
    assert ((train > 0).sum(0) == 4).all()  # 20 * 2 / 10 clients per class
    for column in train.T:
        assert np.ptp(column[column > 0]) <= 1


def test_size_is_mixed_in_class_and_uneven_in_amount():
    y = labels(20000, 4, 1), labels(4000, 4, 2)
    made = partition(*y, "size", 4, rng(), sizes=[1, 2, 3, 4])
    assert list(map(len, made.train)) == [2000, 4000, 6000, 8000]
    assert list(map(len, made.test)) == [400, 800, 1200, 1600]
    counts = made.counts(y[0], 4)
    assert np.abs(counts / counts.sum(1, keepdims=True) - 0.25).max() < 0.05


def test_counts_keeps_columns_of_absent_classes():
    made = partition(np.array([0, 0, 2, 2]), np.array([0, 2]), "iid", 2, rng())
    assert made.counts(np.array([0, 0, 2, 2]), 5).shape == (2, 5)
    with pytest.raises(ValueError, match="part must be 'train' or 'test'; got 'val'"):
        made.counts(np.array([0, 0, 2, 2]), 5, "val")


def test_redraws_until_the_minimum_as_the_published_cifar10_code():
    y = np.repeat(np.arange(10), 5000), np.repeat(np.arange(10), 1000)
    passed = 0
    for seed in range(30):
        made = partition(*y, "dirichlet", 100, rng(seed), alpha=0.1, min_train=16, min_test=0, max_draws=1)
        check(made, *y, 100, 16, 0)
        passed += made.moved == (0, 0)
    assert passed < 10  # few draws pass unrepaired
    made = partition(*y, "dirichlet", 100, rng(), alpha=0.1, min_train=16, max_draws=1000)
    assert made.draws > 1 and made.moved == (0, 0)


def test_a_draw_is_fast():
    y = labels(50000, 10, 1), labels(10000, 10, 2)
    best = min(_seconds(lambda: partition(*y, "dirichlet", 100, rng(), alpha=0.1, max_draws=1)) for _ in range(5))
    assert best < 0.05


def _seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


Y = labels(100, 10), labels(50, 10)


@pytest.mark.parametrize(
    ("scheme", "clients", "options", "message"),
    [
        ("lda", 5, {}, "unknown partition scheme 'lda'; known: iid, dirichlet, pathological, size"),
        ("iid", 0, {}, "clients must be a whole number, 1 or more; got 0"),
        ("iid", 2.0, {}, "clients must be a whole number"),
        ("iid", True, {}, "clients must be a whole number"),
        ("iid", 101, {}, "101 clients with min_train=1 need 101 train samples; there are 100"),
        ("iid", 60, {}, "60 clients with min_test=1 need 60 test samples; there are 50"),
        ("iid", 11, {"min_train": 10}, "11 clients with min_train=10 need 110 train samples; there are 100"),
        ("iid", 5, {"min_train": 0}, "min_train must be a whole number, 1 or more; got 0"),
        ("iid", 5, {"max_draws": 0}, "max_draws must be a whole number, 1 or more; got 0"),
        ("iid", 5, {"alpha": 0.1}, "scheme 'iid' takes no alpha; got 0.1"),
        ("dirichlet", 5, {}, "scheme 'dirichlet' needs alpha"),
        ("dirichlet", 5, {"alpha": 0.0}, "alpha must be a positive number; got 0.0"),
        ("dirichlet", 5, {"alpha": float("nan")}, "alpha must be a positive number; got nan"),
        ("dirichlet", 5, {"alpha": float("inf")}, "alpha must be a positive number; got inf"),
        ("dirichlet", 5, {"alpha": "small"}, "alpha must be a positive number; got 'small'"),
        ("pathological", 5, {}, "needs classes_per_client"),
        ("pathological", 5, {"classes_per_client": 11}, r"classes_per_client must be 1 to 10 .*got 11"),
        ("pathological", 5, {"classes_per_client": 0}, "classes_per_client must be a whole number, 1 or more; got 0"),
        (
            "pathological",
            3,
            {"classes_per_client": 3},
            "3 clients with classes_per_client=3 cannot hold all 10 classes",
        ),
        ("size", 5, {}, "needs either alpha or sizes"),
        ("size", 2, {"alpha": 1.0, "sizes": [1, 2]}, "needs either alpha or sizes"),
        ("size", 3, {"sizes": [1, 2]}, "sizes must be 3 positive numbers"),
        ("size", 2, {"sizes": [1, -2]}, "sizes must be 2 positive numbers"),
        ("size", 2, {"sizes": ["a", "b"]}, "sizes must be 2 positive numbers"),
    ],
)
def test_an_impossible_request_is_one_line(scheme, clients, options, message):
    with pytest.raises(PartitionError, match=message) as caught:
        partition(*Y, scheme, clients, rng(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("y", [np.zeros((3, 2), int), np.array([0.5]), np.array([], int), np.array([-1, 0])])
def test_labels_must_be_labels(y):
    with pytest.raises(PartitionError, match="train_y must be"):
        partition(y, Y[1], "iid", 1, rng())


def test_a_new_scheme_brings_its_own_options():
    def draw(labels, clients, rng, first):
        return tuple(np.arange(len(y)) % clients if first else np.arange(len(y)) // 2 % clients for y in labels)

    register_scheme("turns", Scheme(draw, required=("first",)))
    try:
        assert partition(*Y, "turns", 5, rng(), first=1).train[1].tolist() == list(range(1, 100, 5))
        with pytest.raises(PartitionError, match="'turns' needs first"):
            partition(*Y, "turns", 5, rng())
        with pytest.raises(PartitionError, match="'turns' takes no last; got 1"):
            partition(*Y, "turns", 5, rng(), first=1, last=1)
    finally:
        del SCHEMES["turns"]


def test_a_scheme_that_gives_wrong_owners_is_named():
    for owners in (np.full(100, 5), np.full(100, -1), np.zeros(99, int), np.zeros(100)):
        register_scheme("wrong", Scheme(lambda labels, clients, rng, owners=owners: (owners, np.zeros(50, int))))
        try:
            with pytest.raises(
                PartitionError, match=r"'wrong' must give each of 100 samples an owner in 0..4; it gave"
            ):
                partition(*Y, "wrong", 5, rng())
        finally:
            del SCHEMES["wrong"]


def test_a_scheme_name_is_taken_once():
    with pytest.raises(ValueError, match="'iid' exists already"):
        register_scheme("iid", Scheme(lambda *a: None))
