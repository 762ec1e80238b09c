"""``python -m spafl`` and the ``spafl`` command."""

import re
import sys
from importlib import metadata


def missing() -> list[str]:
    """Distributions of the extra ``sim`` that are not installed; none if this package itself is not."""
    try:
        wanted = metadata.requires("spafl-kernels") or []
    except metadata.PackageNotFoundError:
        return []
    names = [
        re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in wanted if re.search(r"""extra == ['"]sim['"]""", line)
    ]
    return [name for name in names if not any(metadata.distributions(name=name))]


def main() -> int:
    """The command, in a process of its own; without the packages of the simulator it says what is missing."""
    names = missing()
    if names:
        print(
            f"spafl: error: {', '.join(names)} not installed; the simulator is an extra: "
            "pip install 'spafl-kernels[sim]'",
            file=sys.stderr,
        )
        return 1
    from .cli import main as command

    return command(own_process=True)


if __name__ == "__main__":
    sys.exit(main())
