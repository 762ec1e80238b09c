"""``python -m spafl`` and the ``spafl`` command."""

import sys
from importlib.util import find_spec

# What the extra "sim" installs, by the name it is imported under.
_NEEDED = ("cloudpickle", "pydantic", "safetensors", "sklearn", "matplotlib", "tomli_w", "tqdm")


def main() -> int:
    """The command; without the packages of the simulator it says what is missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"spafl: error: {', '.join(missing)} not installed; the simulator is an extra: "
            "pip install 'spafl-kernels[sim]'",
            file=sys.stderr,
        )
        return 1
    from .cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
