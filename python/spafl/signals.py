"""Stopping: SIGINT, SIGTERM and SIGHUP become exceptions, and where something must be whole they wait.

SIGINT is a ``KeyboardInterrupt``, as ever; the others raise :class:`Stopped`. A second signal does not wait. A stop
that is lost on its way (Python drops what is raised in a ``__del__`` or a weak reference's callback) is raised again.
Handlers are only set in the main thread, only for signals that have Python's default, and only for the length of
:func:`catching`, except where the process ends with it.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Seconds after which a stop that nobody has seen is raised again.
_LOST = 1.0


class Stopped(SystemExit):
    """SIGTERM or SIGHUP came; nobody who does not care need catch it: the process ends with status 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def in_one_line(error: BaseException) -> str:
    """An error or a stop in one line, with what was noted about it.

    What it quotes of files and paths may hold line breaks and terminal codes; they are escaped.
    """
    if isinstance(error, Stopped):
        what = f"stopped by {signal.Signals(error.number).name}"
    else:
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    line = "; ".join([what, *(note for note in getattr(error, "__notes__", ()) if "\n" not in note)])
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def exit_status(error: KeyboardInterrupt | Stopped) -> int:
    """128 + the signal's number."""
    return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)


class _Catcher:
    def __init__(self, second_exits: bool) -> None:
        self.second_exits = second_exits
        self.held = False
        self.seen = threading.Event()  # what was raised has arrived where somebody looks after it
        self._first = True
        self._again = False
        self._waiting: int | None = None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        again, self._again = self._again, False
        if again and self.seen.is_set():
            return
        second, self._first = not (self._first or again), False
        if second and self.second_exits:
            os._exit(128 + number)
        self._waiting = number
        if second or not self.held:
            self.release()

    def release(self) -> None:
        """Raise what waits."""
        number, self._waiting = self._waiting, None
        if number is not None:
            self.seen.set()  # an older thread ends
            self.seen = threading.Event()
            threading.Thread(target=self._insist, args=(number, self.seen), daemon=True).start()
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    def _insist(self, number: int, seen: threading.Event) -> None:
        if not seen.wait(_LOST):
            self._again = True
            _thread.interrupt_main(signal.Signals(number))


_active: _Catcher | None = None  # of the main thread


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def catching(second_exits: bool = False, to_the_end: bool = False) -> Iterator[None]:
    """Turn the signals into exceptions inside; nested in another one, or in another thread, this does nothing.

    Args:
        second_exits: a second signal ends the process there and then; otherwise it is raised there and then.
        to_the_end: the process ends after this. The handlers stay while Python takes itself down, where an exception
            would be a traceback: a first signal finds nothing left to stop, a second one is as inside.
    """
    global _active
    if _active is not None or not _in_main_thread():
        yield
        return
    catcher = _active = _Catcher(second_exits)
    # Other handlers are somebody's intention: nohup ignores SIGHUP, a shell SIGINT for what runs in the background.
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in STOPS if signal.getsignal(number) in defaults}
    try:
        for number in before:
            signal.signal(number, catcher.handle)
        yield
    except Stopped as error:
        if not second_exits:  # Python ends without a word
            with contextlib.suppress(OSError):  # the terminal is gone
                print(f"spafl: {in_one_line(error)}", file=sys.stderr)
        raise
    finally:
        catcher.held = True
        catcher.seen.set()
        for number, old in before.items():
            if not to_the_end:
                signal.signal(number, old)
        _active = None
        catcher.release()


def stop_with_input() -> None:
    """Have SIGTERM come when standard input ends: a pipe whose other end went with the process that held it."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _holding(held: bool) -> Iterator[None]:
    catcher = _active if _in_main_thread() else None
    if catcher is None:
        yield
        return
    if isinstance(sys.exc_info()[1], KeyboardInterrupt | Stopped):
        catcher.seen.set()
    before, catcher.held = catcher.held, held
    try:
        if not held:
            catcher.release()
        yield
    except (KeyboardInterrupt, Stopped):
        catcher.seen.set()
        raise
    finally:
        catcher.held = before
    if not before:
        catcher.release()


def held() -> contextlib.AbstractContextManager[None]:
    """A stretch that a first signal does not cut: it is raised at the end."""
    return _holding(True)


def released() -> contextlib.AbstractContextManager[None]:
    """A stretch inside of :func:`held` that may be cut after all."""
    return _holding(False)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Keep the signals from processes that are started here, until they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
