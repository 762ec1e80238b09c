"""One client's process, as Flower starts it for a message, without Flower: what it needs is printed as JSON.

    python -m benchmarks.client_process CONFIG.json STATE-FOLDER

Two rounds of training; the server's part is played by the client's own code. Peak memory is that of the whole process.
"""

import json
import sys
import time
from pathlib import Path

from spafl.flower.lean import without_triton


def peak_mb() -> float:
    """Peak resident memory so far."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main(arguments: list[str]) -> None:
    without_triton()
    import torch

    found: dict[str, object] = {"torch_mb": peak_mb()}
    torch.set_num_threads(1)
    from spafl.config import resolve_config
    from spafl.flower.client import ClientSide, Site
    from spafl.flower.parcel import unpack
    from spafl.flower.roster import Roster
    from spafl.wire import decode, encode

    config = resolve_config(json.loads(arguments[0]))
    side, roster = ClientSide(Site(config, None, Path(arguments[1])), 0), Roster(config, "0" * 32)
    found["start_seconds"] = time.process_time()
    server = side.method.algorithm.server_state(side.method.model)
    for round in range(2):
        frame = encode(side.method.algorithm.broadcast(server, round, 0), round, side.method.uplink.model)
        message = roster.parcel({"client": 0, "round": round, "first": 0, "rounds": []}, [frame])
        begin = time.process_time()
        header, frames = unpack(side.answer("train", message))
        found[f"round{round}_seconds"] = time.process_time() - begin
        if "error" in header:
            raise SystemExit(header["error"])
        found["density"] = header["figures"].get("density", 1.0)
        found["up_bytes"] = sum(t.numel() * t.element_size() for t in decode(frames[0]).values())
    found["peak_mb"] = peak_mb()
    found["imported"] = [name for name in ("sklearn", "matplotlib", "triton", "scipy") if sys.modules.get(name)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
