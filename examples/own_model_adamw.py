"""Any model, any optimiser: CompactModule with AdamW, and what keeps thresholds from pruning everything.

    python examples/own_model_adamw.py

AdamW moves every number by about its learning rate, however small the gradient: thresholds at the weights' rate reach
the scores, which are of the order of .05, within some dozen steps. They get a rate and no decay of their own here, and
the collapse guard after every step.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from spafl_kernels import CompactModule, collapse_guard_, convert, density, threshold_penalty


def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.images[:, None] / 16.0, dtype=torch.float32), torch.tensor(digits.target)


def train(steps: int = 200, threshold_lr: float = 1e-4, penalty: float = 1e-3, guard: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = convert(
        nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(1024, 10),
        ),
        where=lambda name, layer: name != "5",  # every class keeps its neuron
    )  # fmt: skip
    model = CompactModule(net)
    thresholds = [p for name, p in net.named_parameters() if name.endswith("threshold")]
    others = [p for name, p in net.named_parameters() if not name.endswith("threshold")]
    groups = [{"params": others}, {"params": thresholds, "lr": threshold_lr, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    x, y = data()
    for step in range(steps):
        batch = torch.randint(0, len(x), (64,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        (loss + penalty * threshold_penalty(net)).backward()
        optimizer.step()
        if guard:
            collapse_guard_(net)
        if step % 50 == 49:
            shares = ", ".join(f"{name} {share:.2f}" for name, share in density(net).items())
            print(f"step {step + 1}: loss {loss.item():.3f}, density {shares}")
    return net


if __name__ == "__main__":
    net = train()
    x, y = data()
    with torch.no_grad():
        print(f"accuracy on the training data: {(net(x).argmax(1) == y).float().mean():.3f}")
