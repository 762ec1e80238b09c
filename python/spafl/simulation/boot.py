"""The first lines of a worker process, before anything slow is imported. Run by path: it is no part of a package then.

The argument is JSON: the parent's process number, the connection's descriptor, ``sys.path``.
"""

import ctypes
import json
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Have the kernel kill this process, stopped or not, when the one that started it ends, however that ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(1)


def main() -> None:
    parent, connection, path = json.loads(sys.argv[1])
    end_with(parent)
    # Signals to the whole group (Ctrl-C, a batch system) are for the parent to act on. So far they were blocked.
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in stops:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    sys.path[:] = path
    from spafl.simulation.process import serve

    serve(connection)


if __name__ == "__main__":
    main()
