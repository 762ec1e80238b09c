"""The announcement log: everybody hears everything once and in order, and nothing is kept that all have heard."""

import numpy as np

from spafl.simulation.announcements import AnnouncementLog


def test_every_client_hears_everything_in_order():
    rng = np.random.default_rng(0)
    log, heard = AnnouncementLog(heard=[0] * 4), [[] for _ in range(4)]
    for round in range(60):
        for k in rng.choice(4, 2, replace=False):
            heard[k] += [a.round for a in log.missed(k)]
            log.mark_heard(k)
        log.forget_heard()
        log.announce(round, b"x")
        assert len(log.pending) == round + 1 - min(map(len, heard))
    for k in range(4):
        assert heard[k] + [a.round for a in log.missed(k)] == list(range(60))


def test_a_client_that_never_trains_costs_no_more_than_the_log():
    log = AnnouncementLog(heard=[0, 0])
    for round in range(100):
        log.announce(round, b"x")
        log.mark_heard(0)
        log.forget_heard()
    assert len(log.pending) == 100 and log.missed(0) == () and len(log.missed(1)) == 100


def test_a_copy_goes_its_own_way():
    log = AnnouncementLog(heard=[0])
    log.announce(0, b"x")
    other = log.copy()
    other.mark_heard(0)
    other.forget_heard()
    assert len(log.missed(0)) == 1 and other.pending == []
