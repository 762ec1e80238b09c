"""The lines of ``metrics.jsonl`` as flat rows, for tables, CSV files and whoever watches a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .client_results import listed_in, results_path
from .cost import MODELLED, RECORDED

CLIENT_FIELDS = ("accuracy", "loss", "train_accuracy", "density")


def round_row(line: dict[str, Any]) -> dict[str, Any]:
    """A round as one flat dict.

    ``round`` counts from 1; ``accuracy``, ``accuracy_std``, ``accuracy_worst`` (fractions), ``loss`` (of test data),
    ``density`` (mean over layers), ``density_parameters`` and ``density.LAYER`` are None or missing where the round was
    not evaluated; ``train_loss`` is of the clients that trained; costs are cumulative and have the names of
    :class:`spafl.cost.Cost`; ``figures.NAME`` is what an algorithm reports.
    """
    evaluation, density = line["evaluation"] or {}, line["density"] or {}
    accuracy = evaluation.get("accuracy", {})
    row = {
        "round": line["round"] + 1,
        "accuracy": accuracy.get("mean"),
        "accuracy_std": accuracy.get("std"),
        "accuracy_worst": accuracy.get("worst_10pct"),
        "loss": evaluation.get("loss", {}).get("mean"),
        "density": density.get("layer_mean"),
        "density_parameters": density.get("parameters"),
        "train_loss": line.get("train_loss"),
    }
    row |= {name: line["cost"][group][key] for name, (group, key) in RECORDED.items()}
    if "modelled" in line["cost"]:
        row |= {name: line["cost"][group][key] for name, (group, key) in MODELLED.items()}
    row |= {f"density.{layer}": value for layer, value in density.get("layers", {}).items()}
    return row | {f"figures.{name}": value for name, value in (line.get("figures") or {}).items()}


def client_rows(folder: Path, line: dict[str, Any]) -> list[dict[str, Any]]:
    """What every tested client got in a round, one dict each: ``round`` (from 1), ``client``, and what is in
    :data:`CLIENT_FIELDS`; empty where the round was not evaluated."""
    if line["evaluation"] is None:
        return []
    listed = listed_in(line)
    if listed is None:
        clients = [json.loads(text) for text in results_path(folder, line["round"]).read_text().splitlines()]
    else:
        clients = [{"client": k} | {n: listed[n][k] for n in listed} for k in range(len(listed["accuracy"]))]
    return [
        {"round": line["round"] + 1, "client": values["client"], **{name: values.get(name) for name in CLIENT_FIELDS}}
        for values in clients
    ]


def lines_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The rounds of a run folder, as recorded, up to one that is only half written."""
    for text in (folder / "metrics.jsonl").read_bytes().splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            return
