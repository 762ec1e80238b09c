"""Which row holds which client: a round that is not finished leaves nothing behind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spafl.simulation.rows import ClientRows


def value(rows, client):
    return rows.load(client)["x"].item()


def take(rows, client, number, finish=True):
    """A turn that adds ``number``; unfinished, it is a turn whose process was killed before it answered."""
    turn = rows.turn(client)
    rows._store.take(turn.source, turn.target)["x"].add_(number)
    rows._store.keep(turn.target)
    if finish:
        rows.stage(client, turn)
    return turn


@pytest.fixture(params=["memory", "file"])
def rows(request, tmp_path):
    made = ClientRows(tmp_path / "rows", {"x": torch.zeros(())}, 4, request.param)
    yield made
    made.close()


def test_nothing_holds_before_the_round_is_finished(rows):
    take(rows, 2, 5)
    assert value(rows, 2) == 0 and not rows.touched(2)
    take(rows, 2, 1)  # again in the same round: it begins from what the first turn left
    rows.commit()
    assert value(rows, 2) == 6 and rows.touched(2) and not rows.touched(1)
    take(rows, 2, 10)
    rows.abandon()
    assert value(rows, 2) == 6


def test_a_turn_without_an_answer_is_taken_again_from_the_same_row(rows):
    take(rows, 0, 1)
    rows.commit()
    turn = take(rows, 0, 100, finish=False)
    rows._store.take(turn.source, turn.target)["x"].add_(100)  # the same task again
    rows._store.keep(turn.target)
    rows.stage(0, turn)
    rows.commit()
    assert value(rows, 0) == 101


STEP = st.tuples(st.sampled_from(["train", "killed", "commit", "abandon", "save"]), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=40))
def test_any_course_of_events_gives_what_a_dictionary_would(tmp_path_factory, steps):
    rows = ClientRows(tmp_path_factory.mktemp("rows") / "rows", {"x": torch.zeros(())}, 4, "memory")
    held, now = [0.0] * 4, [0.0] * 4
    for number, (what, client) in enumerate(steps, 1):
        if what == "train" and len(rows._reserved) < 8:  # a round changes a client at most twice
            take(rows, client, number)
            now[client] += number
        elif what == "killed" and len(rows._reserved) < 8:
            take(rows, client, number, finish=False)
        elif what == "commit":
            rows.commit()
            held = list(now)
        elif what == "abandon":
            rows.abandon()
            now = list(held)
        elif what == "save" and held == now and not rows._reserved:
            rows.load(client)["x"].fill_(number)
            rows.save(client)
            held[client] = now[client] = float(number)
        assert [value(rows, k) for k in range(4)] == held
        assert rows._next <= rows.rows
    rows.close()
