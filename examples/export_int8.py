"""A federated run, a client's model as ONNX, the same model in int8 by onnxruntime's quantiser, and what that costs.

    python examples/export_int8.py [folder]

Weights and activations are quantised statically, calibrated on the client's own training images. The graph takes bytes:
its input normalisation is part of it.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import spafl
from spafl.simulation.problem import cut_data, load_data

CLIENT = 3
CONFIG = {
    "name": "int8",
    "rounds": 20,
    "data": {"name": "digits"},
    "partition": {"clients": 6, "scheme": "iid"},
    "model": {"name": "lenet5"},
    "algorithm": {"name": "spafl", "variant": "paper", "penalty": 0.002},
    "training": {"lr": 0.02, "batch_size": 16, "epochs": 2},
    "sampling": {"clients_per_round": 6},
    "evaluation": {"every": 20},
}


class Images(CalibrationDataReader):
    """One image at a time, as the quantiser asks for them."""

    def __init__(self, x: np.ndarray) -> None:
        self.batches = iter([{"image": image[None]} for image in x])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantise(source: Path, target: Path, calibration: np.ndarray) -> None:
    """``source`` in int8: symmetric weights, one scale for each channel, and activations."""
    logging.getLogger().setLevel(logging.ERROR)
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared), str(target), Images(calibration), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    prepared.unlink()


def measure(file: Path, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Accuracy, and microseconds an image on one thread (median of 20 passes)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    times = []
    for _ in range(20):
        start = time.perf_counter()
        (logits,) = session.run(None, {"image": x})
        times.append(time.perf_counter() - start)
    return float((logits.argmax(1) == y).mean()), 1e6 * float(np.median(times)) / len(x)


def main(folder: Path, config: dict = CONFIG) -> dict[str, tuple[float, float]]:
    run = spafl.run(config, folder / "run")
    done = run.export(CLIENT, folder / "export", onnx=True, normalise=True)
    plain = done.files[1]
    small = plain.with_name("client-int8.onnx")
    data = load_data(run.config)
    parts = cut_data(run.config, data)
    quantise(plain, small, data.train_x[parts.train[CLIENT]])
    # All test images, of which the client's own are a sixth: both models see the same ones.
    found = {}
    print(f"parameters {done.parameters[0]:,} -> {done.parameters[1]:,} by pruning")
    for name, file in (("float32", plain), ("int8", small)):
        found[name] = measure(file, data.test_x, data.test_y)
        accuracy, microseconds = found[name]
        print(f"{name:8} {file.stat().st_size / 1000:7.1f} kB  accuracy {accuracy:.4f}  {microseconds:.0f} us an image")
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="spafl-int8-")))
