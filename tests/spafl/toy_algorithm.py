"""A miniature HeteroFL, written as an outsider would: client-sized sub-models of a one-hidden-layer net."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.nn import functional as F

from spafl.algorithms import Algorithm, BaseOptions, Evaluation, Training, Upload
from spafl.cost import Cost


class ToyOptions(BaseOptions):
    rates: tuple[float, ...] = (1.0, 0.5)


class ToyHeteroFL(Algorithm):
    """Client k trains the first ``rate * 64`` hidden units; units are averaged over the clients that hold them."""

    Options = ToyOptions
    hidden: ClassVar[int] = 64

    def client_state(self, model):
        return {}

    def server_state(self, model):
        generator = torch.Generator().manual_seed(0)
        return {
            "hidden": torch.randn(self.hidden, 784, generator=generator) / 28,
            "out": torch.randn(10, self.hidden, generator=generator) / 8,
        }

    def _width(self, client: int) -> int:
        return int(self.options.rates[client % len(self.options.rates)] * self.hidden)

    def broadcast(self, server, round, client):
        width = self._width(client)
        return {"hidden": server["hidden"][:width].clone(), "out": server["out"][:, :width].clone()}

    @staticmethod
    def _forward(weights, x):
        return F.linear(F.relu(F.linear(x.flatten(1), weights["hidden"])), weights["out"])

    def train(self, client, message, round):
        weights = {name: tensor.clone().requires_grad_() for name, tensor in message.items()}
        losses = []
        for x, y in client.training_batches(round):
            loss = F.cross_entropy(self._forward(weights, x), y)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            with torch.no_grad():
                for tensor, gradient in zip(weights.values(), gradients, strict=True):
                    tensor -= client.local.lr * gradient
            losses.append(loss.item())
        upload = {name: tensor.detach() for name, tensor in weights.items()}
        return Training(
            upload,
            sum(losses) / len(losses),
            Cost(steps=len(losses), executed_macs=None),
            {"width": float(len(upload["hidden"]))},
        )

    def merge(self, server, round, uploads: Sequence[Upload], clients):
        merged = {name: tensor.clone() for name, tensor in server.items()}
        for unit in range(self.hidden):
            holders = [u.message for u in uploads if len(u.message["hidden"]) > unit]
            if holders:
                merged["hidden"][unit] = torch.stack([m["hidden"][unit] for m in holders]).mean(0)
                merged["out"][:, unit] = torch.stack([m["out"][:, unit] for m in holders]).mean(0)
        return merged, {}

    def evaluation_message(self, server, round):
        return server

    def evaluate(self, client, message, train_data):
        logits = self._forward(message, client.as_input(client.test.x))
        accuracy = (logits.argmax(1) == client.test.y).float().mean().item()
        return Evaluation(len(client.test), F.cross_entropy(logits, client.test.y).item(), accuracy)

    def paper_bits(self, server, sampled):
        return 0
