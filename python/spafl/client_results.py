"""What every evaluated client got, round by round: ``evaluations/round-000012.jsonl`` in a run folder.

One JSON object per client and line: ``client``, ``samples`` (of its test data), ``accuracy``, ``loss``,
``train_accuracy``, ``density`` (mean over layers) and ``masks`` (by layer, a character 0 or 1 per filter); null where
something was not measured. With ``evaluation.confusion``, also ``confusion``: ``[class, predicted class, how many]`` of
the test samples. Earlier versions wrote ``first_layer``, the mask of that layer alone, and before that lists in
``metrics.jsonl``, one entry per client.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FIELDS = ("accuracy", "loss", "train_accuracy", "density", "masks")


def results_path(folder: Path, round: int) -> Path:
    """The file of a round in a run folder."""
    return folder / "evaluations" / f"round-{round:06d}.jsonl"


def listed_in(line: dict[str, Any]) -> dict[str, list[Any]] | None:
    """The values of all clients by field, if a line of the metrics lists them itself; empty fields are left out."""
    evaluation, density = line["evaluation"], line["density"]
    if "clients" not in evaluation["accuracy"]:
        return None
    found = {
        "accuracy": evaluation["accuracy"]["clients"],
        "loss": evaluation["loss"]["clients"],
        "train_accuracy": evaluation["train_accuracy"],
        "density": density["clients"] if density else None,
    }
    return {name: values for name, values in found.items() if values is not None}
