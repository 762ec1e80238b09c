from spafl import rng


def test_streams_depend_on_every_part_of_the_key_and_on_nothing_else():
    base = (1, "shuffle", 2, 3)
    keys = [base, (2, "shuffle", 2, 3), (1, "augment", 2, 3), (1, "shuffle", 3, 3), (1, "shuffle", 2, 4)]
    draws = [rng.numpy_stream(*key).integers(0, 2**60) for key in keys]
    assert len(set(draws)) == len(keys)
    assert rng.numpy_stream(*base).integers(0, 2**60) == draws[0]
    assert rng.torch_stream(*base).initial_seed() == rng.stream_seed(*base) < 2**63


def test_streams_are_the_same_in_every_release():
    # A changed stream silently changes every published run.
    assert rng.stream_seed(1, "initial model") == rng.stream_seed(1, "initial model", 0, 0)
    assert rng.numpy_stream(1, "sampling", 0).choice(100, 3, replace=False).tolist() == EXPECTED


EXPECTED = [97, 16, 58]
