"""Run folders compared file by file, and runs whose file operations fail or end the process."""

import errno
import json
import os
import sys
from pathlib import Path

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}


def contents(folder: Path) -> dict[str, object]:
    """Everything in a run folder by path, without the seconds and what is computed from them."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = str(path.relative_to(folder)), path.read_bytes()
        if path.name == "metrics.jsonl":
            found[name] = [_timeless(json.loads(line)) for line in data.splitlines()]
        elif path.name in ("summary.json", "state.json"):
            found[name] = _timeless(json.loads(data))
        elif path.name == "manifest.json":
            manifest = json.loads(data)["content"]
            manifest["files"]["state.json"] = None
            found[name] = manifest
        else:
            found[name] = data
    return found


def _timeless(value):
    if not isinstance(value, dict):
        return value
    return {key: _timeless(item) for key, item in value.items() if "seconds" not in key and key != "environment"}


def assert_same_folders(a: Path, b: Path) -> None:
    found, expected = contents(a), contents(b)
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name] == expected[name], name


class _Watch:
    """Sees every change this process is about to make under a folder. Audit hooks cannot be removed: there is one."""

    def __init__(self):
        self.folder = None
        sys.addaudithook(self)

    def __call__(self, event, args):
        if self.folder is None:
            return
        if event == "open":
            path, _, flags = args
            if not isinstance(path, str | bytes | os.PathLike) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in CHANGES:
            path, flags = args[0], 0
        else:
            return
        if os.fsdecode(path).startswith(self.folder):
            self.seen += 1
            self.act(self.seen, event, os.fsdecode(path), flags)

    def over(self, folder, act):
        self.folder, self.seen, self.act = str(folder), 0, act


_watch: _Watch | None = None


def watch(folder, act):
    """Have ``act(number, event, path, flags)`` called before each change under ``folder``; None: not any more."""
    global _watch
    _watch = _watch or _Watch()
    _watch.over(folder, act)
    if folder is None:
        _watch.folder = None


def count_changes(folder, work) -> int:
    """How many changes ``work()`` makes under ``folder``."""
    watch(folder, lambda *_: None)
    try:
        work()
        return _watch.seen
    finally:
        watch(None, None)


def killed_at(folder, work, number: int, torn: bool) -> bool:
    """Carry out ``work()`` in a forked process that ends, as if killed, before its change ``number``.

    ``torn``: a file that would be opened for writing then is left as it is between being opened and being written.
    """

    def act(seen, event, path, flags):
        if seen == number:
            if torn and event == "open":
                descriptor = os.open(path, flags & ~os.O_EXCL, 0o600)
                if flags & os.O_APPEND:
                    os.write(descriptor, b'{"round": 1, "samp')
            os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            watch(folder, act)
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def full_from(folder, work, number: int, error: int = errno.ENOSPC):
    """Carry out ``work()`` where nothing under ``folder`` can be created from change ``number`` on."""

    def act(seen, event, path, flags):
        if seen >= number and event in ("open", "os.mkdir", "os.link", "os.rename"):
            raise OSError(error, os.strerror(error), path)

    watch(folder, act)
    try:
        work()
    finally:
        watch(None, None)


def client_values(folder):
    """``(round, client, values)`` of every evaluated round, rounds from 0."""
    from spafl.records import CLIENT_FIELDS, client_rows, lines_of

    rows = [row for line in lines_of(folder) for row in client_rows(folder, line)]
    return [(row["round"] - 1, row["client"], {name: row[name] for name in CLIENT_FIELDS}) for row in rows]
