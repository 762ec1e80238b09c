"""FedAvg (McMahan et al., AISTATS 2017): one global dense model, averaged with the clients' sample counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spafl_kernels import to_dense

from ..cost import Cost
from ..wire import Message, payload_bytes
from .aggregate import AggregationOptions, robust_mean
from .base import Algorithm, ServerState, Training, Upload
from .client import Client, Evaluation


def dense_paper_macs(client: Client) -> float:
    """``3 E D sum MAC``: forward plus twice that for backward, counted over the layers that SpaFL would mask."""
    return 3.0 * client.local.epochs * len(client.train) * sum(client.macs.values())


@torch.no_grad()
def load_state(model: nn.Module, message: Message) -> None:
    """Copy a message that holds a whole state dict into a model, in place."""
    own = model.state_dict()
    if own.keys() != message.keys():
        missing = sorted(own.keys() ^ message.keys())
        raise ValueError(f"message and model differ in tensor {missing[0]!r}")
    for name, tensor in own.items():
        tensor.copy_(message[name])


class FedAvg(Algorithm):
    """Dense baseline. BatchNorm statistics are averaged like weights; momentum starts fresh in every round."""

    Options = AggregationOptions
    options: AggregationOptions

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        return to_dense(model)

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return {}

    def server_state(self, model: nn.Module) -> ServerState:
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        return server

    def train(self, client: Client, message: Message, round: int) -> Training:
        load_state(client.model, message)
        client.trainer.begin(client.sgd_options(round))
        loss, steps = client.run_sgd(round)
        result = client.trainer.finish()
        upload = {name: tensor.detach().cpu().clone() for name, tensor in client.model.state_dict().items()}
        return Training(upload, loss, Cost(steps=steps, paper_macs=dense_paper_macs(client), executed_macs=result.macs))

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        how = self.options.aggregation
        total = sum(upload.samples for upload in uploads)
        merged = {}
        for name, old in server.items():
            # In float64, so that the result does not hang on the order of magnitude of the sample counts.
            values = [upload.message[name].double() for upload in uploads]
            if how == "mean":
                mean = torch.zeros_like(old, dtype=torch.float64)
                for value, upload in zip(values, uploads, strict=True):
                    mean += value * (upload.samples / total)
            else:
                mean = robust_mean(torch.stack(values), how, self.options.trim)
            merged[name] = (mean if old.is_floating_point() else mean.round()).to(old.dtype)
        return merged, {}

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        return server

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        load_state(client.model, message)
        return client.evaluate_model(train_data)[0]

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        return 2 * sampled * 8 * payload_bytes(server)
