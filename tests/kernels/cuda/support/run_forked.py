"""Runs pytest once per faulty library, each in a fork of one process that has imported torch: seconds less per fault.

python run_forked.py "[[library, test file, expression for -k], ...]" FILE writes the exit codes to FILE, as JSON.
"""

import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401


def run(library: str, file: str, expression: str) -> int:
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))  # a fault may also loop forever
        os.environ["SPAFL_TEST_CUDA_LIBRARY"] = library
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=line", file, "-k", expression])
        sys.stdout.flush()
        os._exit(int(code))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


Path(sys.argv[2]).write_text(json.dumps([run(*job) for job in json.loads(sys.argv[1])]))
