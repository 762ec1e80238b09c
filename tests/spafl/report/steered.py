"""Run folders with budgets."""

import json

import numpy as np


def steered_run(make_run, target, devices=None):
    """The folder of a run of which clients 0 to 3 take part in every round; their turns as arrays ``(rounds, 4)``."""
    path = make_run("steered", rounds=6)
    config = path / "config.toml"
    config.write_text(config.read_text().replace("[model]", f"target = {target}\n\n[model]"))
    lines = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    generator = np.random.default_rng(3)
    turns = {name: generator.normal(size=(6, 4)) for name in ("coefficient", "set_point", "density", "macs_share")}
    for r, line in enumerate(lines):
        line["turns"] = {"clients": [2, 0, 3, 1], **{name: table[r].tolist() for name, table in turns.items()}}
        if devices:
            line["turns"]["macs_share"][0] = None  # client 2 has a budget of density
            line["system"] = {
                "seconds": 1,
                "joules": 1,
                "away": 0,
                "clients": [2, 0, 3, 1],
                "outcomes": ["in time"] * 4,
            }
            line["system"] |= {"client_seconds": [1.0] * 4, "client_joules": [1.0] * 4}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if devices:
        partition = json.loads((path / "partition.json").read_text()) | {"devices": devices}
        (path / "partition.json").write_text(json.dumps(partition))
    return path, turns
