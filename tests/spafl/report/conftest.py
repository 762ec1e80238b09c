"""Crafts run folders: as earlier versions wrote them, with lists in ``metrics.jsonl``, and as they are written now."""

import json

import numpy as np
import pytest

LENET = {"conv1": 20, "conv2": 50, "fc3": 500, "fc4": 10}


def craft(
    folder,
    name="spafl",
    algorithm="spafl",
    clients=20,
    rounds=6,
    classes=10,
    layers=None,
    evaluate_every=1,
    completed=True,
    seed=0,
    up_bytes=None,
):
    """Write a plausible run folder and return its path; ``evaluate_every=0`` never evaluates."""
    rng = np.random.default_rng(seed)
    layers = layers or LENET
    sparse = algorithm == "spafl"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        f"name = {json.dumps(name)}\nseed = {seed}\nrounds = {rounds}\n\n"
        f'[algorithm]\nname = {json.dumps(algorithm)}\n\n[model]\nname = "lenet5"\n\n'
        f'[data]\nname = "digits"\nclients = {clients}\n'
    )
    shares = rng.dirichlet(0.3 * np.ones(classes), size=clients)
    sizes = rng.integers(30, 120, clients)
    train = [rng.multinomial(n, p).tolist() for n, p in zip(sizes, shares)]
    test = [rng.multinomial(max(n // 5, 4), p).tolist() for n, p in zip(sizes, shares)]
    (folder / "partition.json").write_text(json.dumps({"classes": classes, "train": train, "test": test}))
    sent = {"spafl": 10 * 580 * 4, "fedavg": 10 * 430500 * 4}.get(algorithm, 0) if up_bytes is None else up_bytes
    hardness = rng.normal(0, 0.06, clients)
    taste = rng.uniform(0, 1, (clients, next(iter(layers.values()))))
    common = rng.uniform(0, 1, taste.shape[1])
    final, lines = None, []
    for r in range(rounds):
        progress = 1 - np.exp(-4 * (r + 1) / max(rounds, 1))
        per_layer = {layer: float(1 - (1 - 0.9 / (i + 1)) * progress) for i, layer in enumerate(layers)}
        density = np.clip(np.mean(list(per_layer.values())) + hardness * 0.7, 0.05, 1)
        top = {"spafl": 0.96, "fedavg": 0.93}.get(algorithm, 0.9)
        accuracy = np.clip(0.2 + (top - 0.2) * progress + hardness + rng.normal(0, 0.01, clients), 0, 1)
        evaluated = evaluate_every and (r % evaluate_every == 0 or r == rounds - 1)
        worst = np.sort(accuracy)[: max(1, clients // 10)]
        line = {
            "round": r,
            "sampled": sorted(rng.choice(clients, min(10, clients), replace=False).tolist()),
            "train_loss": float(2.3 * np.exp(-progress * 3)),
            "evaluation": {
                "accuracy": {
                    "mean": float(accuracy.mean()),
                    "std": float(accuracy.std()),
                    "worst_10pct": float(worst.mean()),
                    "clients": accuracy.tolist(),
                },
                "loss": {"mean": 0.3},
                "train_accuracy": np.clip(accuracy + 0.05 * density + 0.01, 0, 1).tolist() if r == rounds - 1 else None,
            }
            if evaluated
            else None,
            "density": {
                "layer_mean": float(np.mean(list(per_layer.values()))),
                "parameters": float(0.9 * per_layer[list(layers)[-1]]),
                "layers": per_layer,
                "clients": density.tolist(),
            }
            if sparse
            else None,
            "first_layer": {
                "name": next(iter(layers)),
                "masks": ["".join("01"[int(b)] for b in 0.5 * (row + common) > 0.45 * progress) for row in taste],
            }
            if sparse and evaluated
            else None,
            "cost": {
                "paper": {"communication_bits": 16 * sent * (r + 1), "macs": 2.6e10 * (r + 1) * (0.6 if sparse else 1)},
                "payload": {"up_bytes": sent * (r + 1), "down_bytes": 2 * sent * (r + 1)},
                "framed": {"up_bytes": (sent + 90) * (r + 1), "down_bytes": 2 * (sent + 90) * (r + 1)},
                "executed": {"macs": 2600000000 * (r + 1) if sparse else None, "steps": 40 * (r + 1)},
                "seconds": {"total": 1.5 * (r + 1), "train": 1.125 * (r + 1), "evaluate": 0.375 * (r + 1)},
            },
        }
        final = line if evaluated else final
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if completed:
        summary = {
            "name": name,
            "algorithm": algorithm,
            "rounds": rounds,
            "completed": True,
            "final": final,
            "best": {"round": final["round"], "accuracy": final["evaluation"]["accuracy"]["mean"]} if final else None,
            "environment": {"torch": "2.13.0", "device": "cpu"},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_as_now(folder, masks):
    """Give a crafted folder a file of client results for each evaluation; ``masks``: rows of 0 and 1 by layer, the same
    in every round."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "evaluations").mkdir()
    for line in lines:
        evaluation, density = line["evaluation"], line["density"]
        del line["first_layer"]
        if evaluation is None:
            continue
        accuracies, trained = evaluation["accuracy"].pop("clients"), evaluation["train_accuracy"]
        evaluation |= {"clients": len(accuracies), "train_accuracy": float(np.mean(trained)) if trained else None}
        densities = density.pop("clients") if density else [None] * len(accuracies)
        records = [
            {
                "client": k,
                "samples": 10,
                "accuracy": accuracy,
                "loss": 0.3,
                "train_accuracy": trained[k] if trained else None,
                "density": densities[k],
                "masks": {layer: rows[k] for layer, rows in masks.items()} or None,
            }
            for k, accuracy in enumerate(accuracies)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "evaluations" / f"round-{line['round']:06d}.jsonl").write_text(text)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def as_now():
    """:func:`write_as_now`."""
    return write_as_now


@pytest.fixture
def make_run(tmp_path):
    """``make_run(folder_name, **craft_arguments) -> Path``."""
    return lambda folder="run", **arguments: craft(tmp_path / folder, **arguments)
