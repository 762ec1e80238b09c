"""The demo on Flower: SpaFL on real handwritten digits in Flower's simulation engine, offline.

python -m spafl.flower.demo [--rounds 10] [--clients 10] [--out runs/flower-demo]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from ..config import deep_merge
from ..demo import demo_config
from ..errors import UserError
from .__main__ import main as start
from .local import simulation_link


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m spafl.flower.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/flower-demo"), help="replaced if it exists")
    args = parser.parse_args(arguments)
    if args.rounds < 1 or args.clients < 2:
        parser.error(f"--rounds must be at least 1 and --clients at least 2; got {args.rounds} and {args.clients}")
    out = args.out.resolve()
    if out.exists() and not (out / "demo.toml").exists() and any(out.iterdir()):
        print(f"spafl: error: --out {out} is not empty and not a demo's; choose another", file=sys.stderr)
        return 2
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = demo_config("spafl", 1, args.rounds)
    changes = {
        "partition": {"clients": args.clients},
        "sampling": {"clients_per_round": max(1, args.clients // 2)},
        "evaluation": {"every": 5},
        "flower": {"patience": 600.0},  # Flower's engine starts by importing PyTorch in several processes
    }
    (out / "demo.toml").write_text(type(config).model_validate(deep_merge(config.model_dump(), changes)).to_toml())
    home = out / "flower"
    os.environ |= {"FLWR_HOME": str(home), "SPAFL_STATE": str(out / "clients")}
    begin = time.monotonic()
    size = f"num-supernodes={args.clients} client-resources-num-cpus=1"
    try:
        with simulation_link(home) as link:
            run = [str(out / "demo.toml"), "--out", str(out / "run"), "--federation", link]
            status = start([*run, "--", "--federation-config", size])
    except UserError as error:
        print(f"spafl: error: {error}", file=sys.stderr)
        return 1
    if status or not (out / "run" / "summary.json").exists():
        print(f"spafl: error: the run did not end well; {home / 'superlink.log'} is Flower's log", file=sys.stderr)
        return status or 1
    from ..report import comparison_table  # pictures need matplotlib, which a client does not

    print(comparison_table([out / "run"]))
    print(
        f"{time.monotonic() - begin:.0f} s, most of them Flower's start; clients' private state is in {out / 'clients'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
