"""The step after backward against autograd through the definition, clip_grad_norm_ and torch.optim.SGD."""

import pytest
import torch

from spafl_kernels import ops, reference

LAYERS = [(6, (3, 2, 2)), (5, (40,)), (3, (7,)), (4, (1,))]


class Full:
    """All filters at full width as torch trains them."""

    def __init__(self, dtype, density):
        generator = torch.Generator().manual_seed(3)
        draw = lambda *s: torch.randn(*s, dtype=dtype, generator=generator)  # noqa: E731
        self.weights = [torch.nn.Parameter(draw(out, *rest)) for out, rest in LAYERS]
        with torch.no_grad():
            self.weights[0][0, 0, 0, 0] = 0.0  # sign(0) = 0
        self.thresholds = []
        for weight in self.weights:
            scores = reference.filter_scores(weight.detach()).sort().values
            cut = scores[-1] + 0.1 if density == 0 else scores[round((1 - density) * (len(scores) - 1))] - 0.01
            self.thresholds.append(torch.nn.Parameter(torch.full_like(scores, float(cut))))
        self.other = torch.nn.Parameter(draw(9))
        # Input channels (here: leading columns) that carry a gradient; the others are dropped.
        self.columns = [w[0].numel() * 2 // 3 if w[0].numel() > 1 else 1 for w in self.weights]
        self.draw = draw

    def parameters(self):
        return [*self.weights, *self.thresholds, self.other]


def split(full, momentum):
    """The compact groups: kept filters of each layer, then the pruned ones, which have no gradient."""
    fields = {k: [] for k in ("weights", "thresholds", "scores", "masks", "n_in", "dropped")}
    index = []
    for kept in (True, False):
        for l, (weight, threshold) in enumerate(zip(full.weights, full.thresholds)):
            scores = reference.filter_scores(weight.detach())
            mask = scores > threshold.detach()
            rows = (mask == kept).nonzero().flatten()
            flat, k = weight.detach().flatten(1)[rows], full.columns[l] if kept else weight[0].numel()
            pad = flat.new_zeros(2 if kept else 0, k)  # padding rows behind the filters
            fields["weights"].append(torch.cat([flat[:, :k], pad]).contiguous())
            fields["dropped"].append(flat[:, k:].contiguous())
            fields["thresholds"].append(threshold.detach()[rows])
            fields["scores"].append(scores[rows])
            fields["masks"].append(mask[rows])
            fields["n_in"].append(weight[0].numel())
            index.append((l, rows, kept))
    if momentum:
        for name in ("weights", "dropped", "thresholds"):
            fields[name.removesuffix("s") + "_momenta"] = [torch.zeros_like(t) for t in fields[name]]
    return ops.FilterRows(**fields), index


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
    other = full.other.detach().clone()
    other_momentum = torch.zeros_like(other)
    rows, index = split(full, momentum)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for _ in range(3):
        # The data loss: linear in the masked weight, zero at dropped columns. Filters stay in their groups while masks
        # change, so pruned filters are given no data gradient by freezing their share of it.
        signal = [full.draw(*w.shape) for w in full.weights]
        for l, s in enumerate(signal):
            s.flatten(1)[:, full.columns[l] :] = 0
            kept = torch.zeros(len(s), dtype=torch.bool)
            kept[index[l][1]] = True
            s[~kept] = 0
        optimizer.zero_grad()
        loss = penalty * sum(torch.exp(-t).sum() for t in full.thresholds)
        masks = []
        for weight, threshold, s in zip(full.weights, full.thresholds, signal):
            masked, _ = reference.mask_weight_and_bias(weight, threshold, None, estimator, False)
            loss = loss + (masked * s).sum()
            masks.append(reference.filter_mask(weight.detach(), threshold.detach(), estimator))
        other_grad = full.draw(9)
        loss = loss + (full.other * other_grad).sum()
        loss.backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in full.parameters()]))
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(full.parameters(), max_norm)
        optimizer.step()

        grads, dots = [], []
        for group, (l, filters, kept) in enumerate(index):
            raw = signal[l].flatten(1)[filters]
            grads.append(raw.new_empty(0))
            dots.append(raw.new_empty(0))
            if not kept:
                continue
            # What a compact layer's backward gives: the gradient of the stored columns, 0 for the filters among them
            # that are pruned by now; those bring their r_i along, which the gradient does not show.
            stored, mask = raw[:, : full.columns[l]], masks[l][filters]
            if group % 2 or not mask.all():
                dots[-1] = (stored * rows.weights[group][: len(filters)]).sum(1)
            padding = torch.full_like(rows.weights[group][len(filters) :], float("nan"))
            grads[-1] = torch.cat([stored * mask.unsqueeze(1), padding]).contiguous()
        before = [m.clone() for m in rows.masks]
        got, flips = ops.threshold_step(
            rows, grads, [other], [other_grad.clone()], [other_momentum] if momentum else [], [0], lr=lr,
            momentum=momentum, weight_decay=weight_decay, penalty=penalty, max_norm=max_norm, estimator=estimator,
            dots=dots, backend=backend,
        )  # fmt: skip
        if max_norm is not None:
            torch.testing.assert_close(got, norm, **tolerance)
        torch.testing.assert_close(other, full.other.detach(), **tolerance)
        for g, (l, filters, _) in enumerate(index):
            count, k = len(filters), rows.weights[g].shape[1]
            expected = full.weights[l].detach().flatten(1)[filters]
            torch.testing.assert_close(rows.weights[g][:count], expected[:, :k], **tolerance)
            assert not rows.weights[g][count:].any(), "padding rows were touched"
            torch.testing.assert_close(rows.dropped[g], expected[:, k:], **tolerance)
            torch.testing.assert_close(rows.thresholds[g], full.thresholds[l].detach()[filters], **tolerance)
            scores = reference.filter_scores(full.weights[l].detach())[filters]
            torch.testing.assert_close(rows.scores[g], scores, **tolerance)
            assert torch.equal(rows.masks[g], scores > full.thresholds[l].detach()[filters])
            assert flips[g] == (rows.masks[g] != before[g]).sum()
            if momentum:
                buffer = optimizer.state[full.weights[l]]["momentum_buffer"].flatten(1)[filters]
                torch.testing.assert_close(rows.weight_momenta[g][:count], buffer[:, :k], **tolerance)
                torch.testing.assert_close(rows.dropped_momenta[g], buffer[:, k:], **tolerance)


def test_masks_flip_both_ways(backend):
    weights = [torch.tensor([[1.0], [1.0]], dtype=torch.double)]
    rows = ops.FilterRows(
        weights, [torch.tensor([0.5, 1.5], dtype=torch.double)], [torch.ones(2, dtype=torch.double)],
        [torch.tensor([True, False])], [1],
    )  # fmt: skip
    # The first filter shrinks below its threshold, the second grows above it; dots of 0 keep the thresholds still.
    _, flips = ops.threshold_step(
        rows, [torch.tensor([[0.9], [-0.9]], dtype=torch.double)], lr=1.0, dots=[torch.zeros(2, dtype=torch.double)],
        backend=backend,
    )  # fmt: skip
    assert flips.tolist() == [2] and rows.masks[0].tolist() == [False, True]


def test_opcheck(extension):
    rows, index = split(Full(torch.float32, 0.5), 0.9)
    grads = [torch.randn_like(w) if kept else w.new_empty(0) for w, (_, _, kept) in zip(rows.weights, index)]
    none = [w.new_empty(0) for w in rows.weights]
    torch.library.opcheck(
        extension.threshold_step.default,
        (
            rows.weights, grads, rows.weight_momenta, rows.dropped, rows.dropped_momenta, rows.thresholds,
            rows.threshold_momenta, none, rows.scores, rows.masks, rows.n_in, [torch.randn(3)], [torch.randn(3)],
            [torch.randn(3)], [1], 0.1, 0.9, 0.0, 0.1, 1.0, 0.0, False, False,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"weights": []}, {}, "at least one group"),
        ({"scores": []}, {}, "scores must have 1 entries; got 0"),
        ({"scores": [torch.zeros(3)]}, {}, r"scores\[0\] must have shape \(2,\)"),
        ({"weights": [torch.zeros(1, 4)]}, {}, r"weights\[0\] must have at least 2 rows"),
        ({"dropped": [torch.zeros(3, 1)]}, {}, r"dropped\[0\] must have 2 rows"),
        ({"masks": [torch.zeros(2)]}, {}, r"masks\[0\] must be bool or uint8"),
        ({"n_in": [0]}, {}, r"n_in\[0\] must be positive"),
        ({}, {"momentum": 0.9}, "weight_momenta must have 1 entries"),
        ({}, {"grads": [torch.zeros(2, 3)]}, r"grads\[0\] must be empty or have shape \(2, 4\)"),
        ({}, {"dots": [torch.zeros(3)]}, r"dots\[0\] must be empty or have shape \(2,\)"),
        ({}, {"estimator": "soft"}, "estimator must be one of identity, window"),
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
