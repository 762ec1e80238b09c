"""Recordings in the published format, made by the masked engine: for models of which no published one is at hand."""

import json

import numpy as np
import torch

from spafl.conformance import Recording, Replay
from spafl.models import build_model

CLIENTS, ROUNDS, BATCH = 2, 2, 4


def make_recording(path, variant, recorded_name, model_name, classes, penalty):
    """Two clients with eight images each, two rounds of two epochs; thresholds rise fast enough to prune."""
    rng = np.random.default_rng(5)
    arrays = {}
    for client in range(CLIENTS):
        for split, count in (("train", 2 * BATCH), ("test", 5)):
            arrays[f"{split}_x/{client}"] = rng.normal(size=(count, 3, 32, 32)).astype(np.float16)
            arrays[f"{split}_y/{client}"] = rng.integers(0, classes, count)
    for name, tensor in build_model(model_name, classes, 3, seed=1).state_dict().items():
        arrays[f"init/{name}"] = (tensor.half() if tensor.is_floating_point() else tensor).numpy()
    config = {
        "num_clients": CLIENTS, "model": recorded_name, "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0,
        "batch_size": BATCH, "local_epoch": 2, "th_coeff": penalty, "clip": 1e6, "penalty_scheduler": 1,
    }  # fmt: skip
    rounds = [
        {"sampled": rng.permutation(CLIENTS).tolist(), "accuracy": [0.0] * CLIENTS, "loss": [1.0] * CLIENTS,
         "density": [1.0] * CLIENTS, "flops": [1.0] * CLIENTS}
        for _ in range(ROUNDS)
    ]  # fmt: skip

    def write():
        meta = {"variant": variant, "seed": 5, "config": config, "rounds": rounds}
        np.savez(path, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)

    write()
    replay = Replay(Recording(path), "masked")
    for number, recorded in enumerate(rounds):
        evaluations = replay.round(number)
        for name, tensor in replay.server.items():
            if name.endswith(".threshold"):
                arrays[f"round{number}/global/{name}"] = tensor.numpy().copy()
        for client, evaluation in enumerate(evaluations):
            for name, tensor in _floating(replay.tensors[client]):
                sums = np.array([tensor.norm().item(), tensor.sum().item()])
                arrays[f"round{number}/client{client}/l2/{name}"] = sums
            recorded["accuracy"][client] = 100 * evaluation.accuracy
            recorded["loss"][client] = evaluation.loss
            recorded["density"][client] = float(np.mean(list(evaluation.densities.values())))
            recorded["flops"][client] = replay.flops[client]
    for name, tensor in _floating(replay.tensors[0]):
        if tensor.numel() <= 20000:
            arrays[f"final/client0/{name}"] = tensor.numpy().copy()
    write()
    return rounds


def _floating(tensors: dict[str, torch.Tensor]):
    own = ("momentum.", "density")
    return [(name, t) for name, t in tensors.items() if t.is_floating_point() and not name.startswith(own)]
