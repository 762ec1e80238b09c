"""Bytes between a node and its server are counted by message, however often the node asked in vain."""

import pytest

from benchmarks.flower_traffic import Call, calls, messages, zipped


def call(path, up=0, down=0):
    body = b"d" * down
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {down}\r\n\r\n".encode()
    return Call(f"POST {path} HTTP/1.1\r\n\r\n".encode() + b"u" * up, head + body)


def kept(call, connection=0, pieces=1):
    """A call as a proxy sees it."""
    for is_up, raw in ((True, call.up), (False, call.down)):
        size = -(-len(raw) // pieces)
        yield from ((connection, is_up, raw[at : at + size]) for at in range(0, len(raw), size))


def read(call):
    """Of a little protocol: /pull with a body fetches a message, /wait is in vain."""
    if call.path == "/pull":
        return ("train", 7) if call.body else False
    return call.path != "/wait"


def run(waits):
    made = [call("/register", 9, 9)]
    for round in range(3):
        made += [call("/pull", 3, 0), call("/wait", 5, 5)] * waits
        made += [call("/pull", 3, 20), call("/object", 4, 100 + round), call("/push", 50, 6)]
    return made


@pytest.mark.parametrize("pieces", [1, 3])
def test_what_passes_is_cut_into_calls(pieces):
    made = run(2)
    assert calls(piece for each in made for piece in kept(each, pieces=pieces)) == made
    one, other = call("/a", 10, 10), call("/b", 10, 10)
    crossed = [piece for both in zip(kept(one, 0, pieces), kept(other, 1, pieces)) for piece in both]
    assert calls(crossed) == [one, other]
    assert calls([*kept(one), (0, True, b"POST /never HTTP/1.1\r\n\r\n")]) == [one]


def test_a_message_costs_the_same_however_often_a_node_asked_in_vain():
    quick, slow = (messages(run(waits), read) for waits in (0, 40))
    assert [each.bytes() for each in quick[0]] == [each.bytes() for each in slow[0]]
    assert zipped(quick[0]) == zipped(slow[0])
    assert (len(quick[1]), len(slow[1])) == (0, 240)
    first, second, _ = (sum(map(len, (c.up for c in each.calls))) for each in quick[0])
    assert [(each.kind, each.run) for each in quick[0]] == [("train", 7)] * 3 and first == second
    assert quick[0][0].bytes()[0] == sum(len(c.up) for c in (call("/pull", 3), call("/object", 4), call("/push", 50)))


def test_what_was_sent_before_makes_later_messages_small():
    small = zipped(messages(run(0), read)[0])
    assert small[1][0] < small[0][0] / 2


def test_a_response_of_another_length_than_announced_is_refused():
    torn = call("/pull", 3, 20)
    torn.down = torn.down[:-1]
    with pytest.raises(ValueError, match="are not what its head announces"):
        _ = torn.body
