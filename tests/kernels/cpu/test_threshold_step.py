"""The step after backward against autograd through the definition, clip_grad_norm_ and torch.optim.SGD."""

import pytest
import torch
from torch import library

from spafl_kernels import ops, reference

LAYERS = [(6, (3, 2, 2)), (5, (40,)), (3, (7,)), (4, (1,)), (33, (70,))]


class Full:
    """All filters at full width as torch trains them."""

    def __init__(self, dtype, density):
        generator = torch.Generator().manual_seed(3)
        self.draw = lambda *s: torch.randn(*s, dtype=dtype, generator=generator)
        self.weights = [torch.nn.Parameter(self.draw(out, *rest)) for out, rest in LAYERS]
        with torch.no_grad():
            self.weights[0][0, 0, 0, 0] = 0.0  # sign(0) = 0
        self.thresholds = []
        for weight in self.weights:
            scores = reference.filter_scores(weight.detach()).sort().values
            cut = scores[-1] + 0.1 if density == 0 else scores[round((1 - density) * (len(scores) - 1))] - 0.01
            self.thresholds.append(torch.nn.Parameter(torch.full_like(scores, float(cut))))
        self.other = torch.nn.Parameter(self.draw(9))
        # Leading columns are stored, the rest dropped. In the last layer dropped columns have a gradient too.
        self.columns = [max(1, w[0].numel() * 2 // 3) for w in self.weights]

    def parameters(self):
        return [*self.weights, *self.thresholds, self.other]


def compact(full, momentum, estimator):
    """The stored filters are those that are active at the start."""
    fields = {k: [] for k in ("weights", "thresholds", "scores", "masks", "n_in", "dropped", "index")}
    for weight, threshold, k in zip(full.weights, full.thresholds, full.columns):
        scores = reference.filter_scores(weight.detach())
        mask = scores > threshold.detach()
        index = mask.nonzero().flatten()
        flat = weight.detach().flatten(1)[index]
        flat = torch.cat([flat, flat.new_zeros(2, flat.shape[1])])  # two rows of padding
        fields["weights"].append(flat[:, :k].contiguous())
        fields["dropped"].append(flat[:, k:].contiguous())
        fields["thresholds"].append(threshold.detach().clone())
        fields["scores"].append(scores)
        fields["masks"].append(mask)
        fields["n_in"].append(weight[0].numel())
        fields["index"].append(index)
    if momentum:
        for name in ("weights", "dropped", "thresholds"):
            fields[name.removesuffix("s") + "_momenta"] = [torch.zeros_like(t) for t in fields[name]]
    return ops.FilterRows(**fields, estimators=[estimator] * len(LAYERS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("estimator", reference.ESTIMATORS)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("momentum", "weight_decay", "max_norm"), [(0.9, 5e-4, 1.0), (0.0, 0.0, None), (0.9, 0.0, 0.1), (0.0, 1e-2, 100.0)]
)
def test_equals_torch(momentum, weight_decay, max_norm, density, estimator, dtype, backend):
    full = Full(dtype, density)
    penalty, lr = 0.3, 0.05
    optimizer = torch.optim.SGD(full.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    other, rows = full.other.detach().clone(), compact(full, momentum, estimator)
    other_momentum = torch.zeros_like(other)
    start = [w.detach().clone() for w in full.weights]
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for _ in range(3):
        # A data loss that is linear in the masked weights, without a part in filters that are not stored (as behind a
        # ReLU), nor in dropped columns except those of the last layer.
        signal = [full.draw(*w.shape) for w in full.weights]
        for l, s in enumerate(signal):
            s[torch.isin(torch.arange(len(s)), rows.index[l], invert=True)] = 0
            if l + 1 < len(signal):
                s.flatten(1)[:, full.columns[l] :] = 0
        optimizer.zero_grad()
        loss = penalty * sum(torch.exp(-t).sum() for t in full.thresholds)
        masks = []
        for weight, threshold, s in zip(full.weights, full.thresholds, signal):
            masked, _ = reference.mask_weight_and_bias(weight, threshold, None, estimator, False)
            loss = loss + (masked * s).sum()
            masks.append(reference.filter_mask(weight.detach(), threshold.detach(), estimator))
        other_grad = full.draw(9)
        (loss + (full.other * other_grad).sum()).backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in full.parameters()]))
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(full.parameters(), max_norm)
        optimizer.step()

        grads, dropped_grads, dots = [], [], []
        for l, index in enumerate(rows.index):
            s, mask, k = signal[l].flatten(1)[index], masks[l][index], full.columns[l]
            poison = torch.full((2, s.shape[1]), float("nan"), dtype=dtype)  # padding rows are never read
            # The gradient of a filter that is pruned by now is masked away; its r_i is given instead.
            g = torch.cat([s * mask.unsqueeze(1), poison])
            grads.append(g[:, :k].contiguous())
            dropped_grads.append(g[:, k:].contiguous() if l + 1 == len(signal) else s.new_empty(0))
            dots.append(s.new_empty(0))
            if l % 2 or not mask.all():
                now = torch.cat([rows.weights[l], rows.dropped[l]], 1)[: len(index)]
                dots[-1] = (s * now).sum(1)
        before = [m.clone() for m in rows.masks]
        got, flips = ops.threshold_step(
            rows, grads, [other], [other_grad.clone()], [other_momentum] if momentum else [], [0], lr=lr,
            momentum=momentum, weight_decay=weight_decay, penalty=penalty, max_norm=max_norm,
            dropped_grads=dropped_grads, dots=dots, backend=backend,
        )  # fmt: skip
        if max_norm is not None:
            torch.testing.assert_close(got, norm, **tolerance)
        torch.testing.assert_close(other, full.other.detach(), **tolerance)
        for l, index in enumerate(rows.index):
            count, k = len(index), full.columns[l]
            expected = full.weights[l].detach().flatten(1)[index]
            torch.testing.assert_close(rows.weights[l][:count], expected[:, :k], **tolerance)
            torch.testing.assert_close(rows.dropped[l][:count], expected[:, k:], **tolerance)
            assert not rows.weights[l][count:].any() and not rows.dropped[l][count:].any(), "padding was touched"
            torch.testing.assert_close(rows.thresholds[l], full.thresholds[l].detach(), **tolerance)
            # Filters that are not stored keep the score they had: the caller moves them.
            scores = reference.filter_scores(start[l])
            scores[index] = reference.filter_scores(full.weights[l].detach())[index]
            torch.testing.assert_close(rows.scores[l], scores, **tolerance)
            assert torch.equal(rows.masks[l], scores > full.thresholds[l].detach())
            assert flips[l] == (rows.masks[l] != before[l]).sum()
            if momentum:
                buffer = optimizer.state[full.weights[l]]["momentum_buffer"].flatten(1)[index]
                torch.testing.assert_close(rows.weight_momenta[l][:count], buffer[:, :k], **tolerance)
                torch.testing.assert_close(rows.dropped_momenta[l][:count], buffer[:, k:], **tolerance)


def test_masks_flip_both_ways(backend):
    rows = ops.FilterRows(
        [torch.tensor([[1.0], [1.0]], dtype=torch.double)], [torch.tensor([0.5, 1.5], dtype=torch.double)],
        [torch.ones(2, dtype=torch.double)], [torch.tensor([True, False])], [1],
    )  # fmt: skip
    # The first filter shrinks below its threshold, the second grows above it; dots of 0 keep the thresholds still.
    _, flips = ops.threshold_step(
        rows, [torch.tensor([[0.9], [-0.9]], dtype=torch.double)], lr=1.0, dots=[torch.zeros(2, dtype=torch.double)],
        backend=backend,
    )  # fmt: skip
    assert flips.tolist() == [2] and rows.masks[0].tolist() == [False, True]


def test_layers_of_different_estimators(backend):
    weight = torch.tensor([[1.0, -1.0], [4.0, 4.0]], dtype=torch.double)
    results = []
    for estimators in (["identity", "window"], ["window", "identity"]):
        rows = ops.FilterRows(
            [weight.clone(), weight.clone()], [torch.zeros(2, dtype=torch.double) for _ in range(2)],
            [torch.tensor([1.0, 4.0], dtype=torch.double) for _ in range(2)],
            [torch.ones(2, dtype=torch.bool) for _ in range(2)], [2, 2], estimators=estimators,
        )  # fmt: skip
        grads = [
            torch.ones(2, 2, dtype=torch.double) * torch.tensor([[1.0, 2.0]], dtype=torch.double) for _ in range(2)
        ]
        ops.threshold_step(rows, grads, lr=1.0, backend=backend)
        results.append([t.tolist() for t in rows.thresholds])
    # r = (1 - 2, 4 + 8); the window is closed for the first filter, whose score is 1 from its threshold.
    assert results == [[[-1.0, 12.0], [0.0, 12.0]], [[0.0, 12.0], [-1.0, 12.0]]]


def test_opcheck(extension):
    r = compact(Full(torch.float32, 0.5), 0.9, "window")
    grads = [torch.randn_like(w) for w in r.weights[:-1]] + [r.none[0]]
    library.opcheck(
        extension.threshold_step.default,
        (
            r.weights, grads, r.weight_momenta, r.dropped, r.none, r.dropped_momenta, r.thresholds,
            r.threshold_momenta, r.none, r.index, r.scores, r.masks, r.n_in, r.window, [torch.randn(3)],
            [torch.randn(3)], [torch.randn(3)], [1], 0.1, 0.9, 0.0, 0.1, 1.0, 0.0, False,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"weights": []}, {}, "at least one layer"),
        ({"scores": []}, {}, "scores must have 1 entries; got 0"),
        ({"scores": [torch.zeros(3)]}, {}, r"scores\[0\] must have shape \(2,\)"),
        ({"weights": [torch.zeros(1, 4)]}, {}, r"weights\[0\] must have at least 2 rows"),
        ({"dropped": [torch.zeros(1, 1)]}, {}, r"dropped\[0\] must have at least 2 rows"),
        ({"masks": [torch.zeros(2)]}, {}, r"masks\[0\] must be bool or uint8"),
        ({"n_in": [0]}, {}, r"n_in\[0\] must be positive"),
        ({"index": [torch.tensor([0, 2])]}, {}, r"index\[0\] must be int64 in \[0, 2\)"),
        ({"index": [torch.tensor([1, 1])]}, {}, r"index\[0\] must not hold a filter twice; got \[1, 1\]"),
        ({"estimators": ["soft"]}, {}, "estimator must be one of identity, window"),
        ({}, {"momentum": 0.9}, "weight_momenta must have 1 entries"),
        ({}, {"grads": [torch.zeros(2, 3)]}, r"grads\[0\] must be empty or have shape \(2, 4\)"),
        ({}, {"dropped_grads": [torch.zeros(2, 3)]}, r"dropped_grads\[0\] must be empty or have shape \(0,\)"),
        ({}, {"dots": [torch.zeros(1)]}, r"dots\[0\] must be empty or have shape \(2,\)"),
        ({}, {"lr": -1.0}, "lr must be finite"),
    ],
)
def test_bad_input(change, options, message):
    fields = {
        "weights": [torch.zeros(2, 4)], "thresholds": [torch.zeros(2)], "scores": [torch.zeros(2)],
        "masks": [torch.zeros(2, dtype=torch.bool)], "n_in": [4],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.threshold_step(ops.FilterRows(**(fields | change)), **({"grads": [torch.zeros(2, 4)], "lr": 0.1} | options))


def test_the_operator_refuses_an_index_out_of_range(extension):
    rows = compact(Full(torch.float32, 0.5), 0.0, "identity")
    rows.index[1] = rows.index[1] + 100
    with pytest.raises(RuntimeError, match=r"index\[1\] must be in \[0, 5\)"):
        ops.threshold_step(rows, rows.none, lr=0.1, check=False, backend="native")
