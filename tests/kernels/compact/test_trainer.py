"""The compact trainer against the masked one, in float64 over whole trajectories: everything either of them keeps."""

import copy
import re

import pytest
import torch
from helpers import batches, compare, compare_steps, prune
from torch import nn

from spafl.models import Conv4, LeNet5, ResNet18, ViT
from spafl_kernels import ThresholdConv2d, ThresholdLinear, native, threshold_layers
from spafl_kernels.compact import CompactModule, CompactTrainer
from spafl_kernels.compact.graph.follow import trace_flow
from spafl_kernels.compact.kinds import norms
from spafl_kernels.compact.run import fusion
from spafl_kernels.engines import make_trainer
from spafl_kernels.training import MaskedTrainer, SGDOptions, Unsupported

EVERYTHING = SGDOptions(lr=0.02, momentum=0.9, weight_decay=1e-3, max_grad_norm=1.0, penalty=0.003, collapse_floor=0.01)


class Padded(nn.Module):
    """BatchNorm, zero padding and stride, so that pruned channels are constants with a border; biases on request."""

    def __init__(self, bias=False, mask_bias=False, affine=True, act=nn.ReLU, width=10):
        super().__init__()
        args = {"bias": bias, "mask_bias": mask_bias}
        self.net = nn.Sequential(
            ThresholdConv2d(2, width, 3, padding=1, **args),
            nn.BatchNorm2d(width, affine=affine),
            act(),
            ThresholdConv2d(width, 2 * width, 3, stride=2, padding=(1, 2), **args),
            act(),
            ThresholdConv2d(2 * width, width, (3, 2), padding="same", dilation=2, **args),
            nn.BatchNorm2d(width, affine=affine),
            nn.MaxPool2d(2),
            act(),
            nn.Flatten(),
            ThresholdLinear(width * 4, 16, **args),
            nn.BatchNorm1d(16, affine=affine),
            act(),
            ThresholdLinear(16, 5, **args),
        )

    def forward(self, x):
        return self.net(x)


class Thin(nn.Module):
    """LeNet-5, thinner, on 12x12 images."""

    def __init__(self):
        super().__init__()
        self.conv1 = ThresholdConv2d(1, 10, 3, bias=False)
        self.conv2 = ThresholdConv2d(10, 16, 2, bias=False)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()
        self.fc3 = ThresholdLinear(64, 40, bias=False)
        self.fc4 = ThresholdLinear(40, 10, bias=False)

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        return self.fc4(self.relu(self.fc3(x.flatten(1))))


def with_estimator(model, estimator):
    for _, layer in threshold_layers(model):
        layer.estimator = estimator
    return model


def warm_norms(model, seed=3):
    """Affine parameters and statistics that are not at their initial values, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for t, low in ((m.running_mean, -1.0), (m.running_var, 0.3), (m.weight, 0.5), (m.bias, -0.5)):
                    if t is not None:
                        t.copy_(low + torch.rand(t.shape, generator=generator, dtype=t.dtype))
    return model


@pytest.mark.sweep
@pytest.mark.parametrize("patience", [0, 0.5, 1e9])
@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_200_steps(estimator, patience):
    torch.manual_seed(0)
    model = prune(with_estimator(Thin().double(), estimator), 0.6, spread=0.1)
    trainer = CompactTrainer(model, strict=True, verify="never", patience=patience)
    data = batches((1, 12, 12), 200, 4)
    a, b, _, flips = compare(model, EVERYTHING, data, evaluate_every=20, rounds=2, trainer=trainer)
    assert flips > 40
    # Without end to its patience a plan grows to all filters that were ever active.
    assert {0: b.rebuilds > 20, 0.5: 0 < b.rebuilds < 20, 1e9: b.rebuilds < 20}[patience]
    assert b.macs < a.macs or patience > 1


@pytest.mark.sweep
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("biased", [(False, False), (True, False), (True, True)])
def test_filters_that_were_pruned_may_be_computed_on_for_a_while(biased, compiled):
    """With norms, constants and biases; then they are dropped although no mask changes any more."""
    torch.manual_seed(8)
    model = prune(warm_norms(with_estimator(Padded(*biased).double(), "window")), 0.9, spread=0.05)
    options = SGDOptions(lr=0.01, momentum=0.9, weight_decay=1e-3, max_grad_norm=1.0, penalty=0.5)
    for patience in (0, 0.3, 1e9):
        trainer = CompactTrainer(
            copy.deepcopy(model), strict=True, verify="never", compiled=compiled, patience=patience
        )
        *_, flips = compare(
            trainer.model, options, batches((2, 7, 8), 30, 4, classes=5), evaluate_every=5, trainer=trainer
        )
        assert flips > 3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("patience", [0.5, 1e9])
def test_a_row_that_is_computed_on_has_a_gradient_once_its_constant_passes(patience, compiled):
    """Pruned after the plan was made, with a negative beta; then, though no mask changes, beta becomes positive."""
    torch.manual_seed(0)
    net = [ThresholdConv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*net, ThresholdLinear(8 * 25, 3, bias=False)).double()
    nn.init.constant_(model[1].bias, -0.5)
    twin = copy.deepcopy(model)
    masked, compact = (
        MaskedTrainer(twin),
        CompactTrainer(model, strict=True, verify="never", patience=patience, compiled=compiled),
    )
    for trainer in (masked, compact):
        trainer.begin(SGDOptions(lr=0.01))
    for k, (x, y) in enumerate(batches((2, 7, 7), 4, 4, classes=3)):
        if k:
            session = compact._session
            session._update.flipped = True
            if k == 1:
                twin[0].threshold.data[3] = session._tau[3] = 2.0
            if k == 2:
                assert session._layers["0"].slot.rows is not None and not session.rebuilds
                twin[1].bias.data[3] = session._norms["1"].slot.bias.data[3] = 1.0
        torch.testing.assert_close(compact.step(x, y), masked.step(x, y), rtol=1e-9, atol=1e-9)
    compact.finish(), masked.finish()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_idle_filters_are_dropped_though_no_mask_changes_any_more(compiled):
    """In every training after as many steps, whatever the last one left: results must not depend on it."""
    model = prune(Thin().double(), 0.9)
    start = copy.deepcopy(model.state_dict())
    trainer = CompactTrainer(model, strict=True, verify="never", compiled=compiled, patience=0.3)
    runs = []
    for steps in (12, 3, 12):
        model.load_state_dict(start)
        trainer.begin(SGDOptions(lr=1e-9))
        macs = []
        for k, (x, y) in enumerate(batches((1, 12, 12), steps, 4)):
            before = trainer._macs
            trainer.step(x, y)
            macs.append(trainer._macs - before)
            if not k:  # what a threshold does in training, by hand
                session = trainer._session
                session._tau[session._pruned[2].part][:20] = model.fc3.scores().max() * 2
                session._update.flipped = True
        trainer.finish()
        runs.append(macs)
    assert runs[0][2] == runs[0][0] > runs[0][-1]
    assert runs[1] == runs[0][:3] and runs[2] == runs[0]


def test_patience_must_not_be_negative():
    with pytest.raises(ValueError, match="patience"):
        CompactTrainer(LeNet5(), patience=-1)


@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_lenet(estimator):
    torch.manual_seed(0)
    model = prune(with_estimator(LeNet5().double(), estimator), 0.6, spread=0.1)
    a, b, _, flips = compare(model, EVERYTHING, batches((1, 28, 28), 20, 2), evaluate_every=6)
    assert flips > 3 and b.macs < a.macs


@pytest.mark.sweep
@pytest.mark.parametrize("estimator", ["identity", "window"])
@pytest.mark.parametrize("biased", [(False, False), (True, False), (True, True)])
def test_padded_norms_200_steps(estimator, biased):
    torch.manual_seed(1)
    model = warm_norms(with_estimator(Padded(*biased).double(), estimator))
    prune(model, 0.5, spread=0.3)
    # Where a pruned filter meets BatchNorm, "identity" multiplies gradients by 1 / sqrt(eps); at a larger rate such a
    # trajectory is chaotic and two correct programs part.
    options = SGDOptions(
        lr=0.003, momentum=0.9, weight_decay=1e-3, max_grad_norm=1.0, penalty=0.05, collapse_floor=0.01
    )
    data = list(batches((2, 7, 8), 200, 4, classes=5))
    if estimator == "identity" and biased == (True, False):
        # BatchNorm of a bias is beta plus rounding, and ReLU asks for its sign: only single steps are comparable.
        return compare_steps(model, options, data[:100])
    _, b, _, flips = compare(model, options, data, evaluate_every=7, start_momentum=0.01, rounds=2)
    assert flips > 20 and (b.rebuilds > 0 or estimator == "identity")


@pytest.mark.parametrize("estimator", ["identity", "window"])
@pytest.mark.parametrize("masked_bias", [False, True])
def test_plain_pytorch_path(estimator, masked_bias):
    torch.manual_seed(1)
    data = list(batches((2, 7, 8), 40, 4, classes=5))
    options = SGDOptions(lr=0.003, momentum=0.9, weight_decay=1e-3, max_grad_norm=1.0, penalty=0.05, collapse_floor=0.2)
    model = prune(warm_norms(with_estimator(Padded(masked_bias, masked_bias).double(), estimator)), 0.5, spread=0.3)
    compare(
        model,
        options,
        data,
        evaluate_every=7,
        trainer=CompactTrainer(model, strict=True, verify="never", compiled=False),
    )
    model = prune(with_estimator(LeNet5().double(), estimator), 0.6, spread=0.1)
    data = batches((1, 28, 28), 15, 2)
    compare(
        model,
        EVERYTHING,
        data,
        evaluate_every=4,
        trainer=CompactTrainer(model, strict=True, verify="never", compiled=False),
    )


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.LeakyReLU, nn.ReLU6, nn.Sigmoid, nn.Hardswish])
@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_activations(act, estimator):
    torch.manual_seed(2)
    model = prune(warm_norms(with_estimator(Padded(True, act=act).double(), estimator)), 0.4)
    compare(model, EVERYTHING, batches((2, 7, 8), 12, 4, classes=5), evaluate_every=3)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.Tanh, nn.LeakyReLU])
@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AdaptiveMaxPool2d(2), nn.AvgPool2d(2)], ids=str
)
def test_activations_in_front_of_a_pool(act, pool):
    """Only what never falls may change places with a max-pool; the large weights reach where GELU falls."""
    torch.manual_seed(3)
    layers = [ThresholdConv2d(2, 6, 3), act(), pool, nn.Flatten(), nn.LazyLinear(5)]
    model = nn.Sequential(*layers).double()
    model(torch.zeros(1, 2, 7, 8, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.mul_(4)
    compare(prune(model, 0.6), EVERYTHING, batches((2, 7, 8), 6, 4, classes=5), evaluate_every=3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window, padding", [(2, 0), (3, 1)])
@pytest.mark.parametrize("bias, mask_bias", [(False, False), (True, False), (True, True)])
def test_first_layer_with_relu_and_pool(window, padding, bias, mask_bias, compiled):
    """The fused call, and the way around it while a pruned filter with a positive bias must be computed."""
    torch.manual_seed(16)
    model = nn.Sequential(
        ThresholdConv2d(2, 9, 3, padding=padding, bias=bias, mask_bias=mask_bias),
        nn.ReLU(),
        nn.MaxPool2d(window),
        ThresholdConv2d(9, 7, 2, bias=bias, mask_bias=mask_bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        ThresholdLinear(7 if window == 3 else 28, 5),
    ).double()
    prune(model, 0.5, spread=0.05)
    trainer = CompactTrainer(model, strict=True, verify="never", compiled=compiled)
    options = SGDOptions(lr=0.03, momentum=0.9, penalty=0.01, weight_decay=1e-3)
    compare(model, options, batches((2, 12, 12), 30, 3, classes=5), evaluate_every=6, trainer=trainer)


@pytest.mark.sweep
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("estimator", ["identity", "window"])
@pytest.mark.parametrize("window", [nn.MaxPool2d(2), nn.MaxPool2d(3), nn.MaxPool2d(2, 1), nn.AvgPool2d(2)], ids=str)
def test_norm_with_relu_and_pool(window, estimator, compiled, monkeypatch):
    """The fused calls: with the pool (2), without one a kernel knows, and 1-dimensional."""
    calls = []
    apply = norms.DirectBatchNormRelu.apply
    monkeypatch.setattr(norms.DirectBatchNormRelu, "apply", lambda *a: calls.append(a[-1]) or apply(*a))
    torch.manual_seed(16)
    model = nn.Sequential(
        ThresholdConv2d(2, 17, 3, bias=False),
        nn.BatchNorm2d(17),
        nn.ReLU(),
        window,
        ThresholdConv2d(17, 9, 2, padding=1, bias=False),
        nn.BatchNorm2d(9),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        ThresholdLinear(9, 20, bias=False),
        nn.BatchNorm1d(20),
        nn.ReLU(),
        ThresholdLinear(20, 5),
    ).double()
    prune(warm_norms(with_estimator(model, estimator)), 0.5, spread=0.05)
    trainer = CompactTrainer(model, strict=True, verify="never", compiled=compiled)
    options = SGDOptions(lr=0.003, momentum=0.9, penalty=0.01, weight_decay=1e-3, max_grad_norm=1.0)
    compare(model, options, batches((2, 12, 12), 30, 4, classes=5), evaluate_every=6, trainer=trainer)
    pool = 2 if isinstance(window, nn.MaxPool2d) and window.stride == 2 else 1
    # The 10 x 10 map of the first norm is no multiple of 3.
    assert calls[:3] == ([pool, 1, 1] if compiled and native.available() else [])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("reads", ["before relu", "after relu"])
def test_a_shape_in_front_of_a_pool_is_that_of_the_map(normed, reads):
    """Where somebody asks for the size of a map, no fused call may put the pooled map in its place."""

    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ThresholdConv2d(1, 8, 3, bias=False)
            if normed:
                self.norm = nn.BatchNorm2d(8)
            self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
            self.head = ThresholdLinear(8 * 9, 5)

        def forward(self, x):
            first = self.norm(self.conv(x)) if normed else self.conv(x)
            second = self.relu(first)
            out = self.head(self.pool(second).flatten(1))
            return out * (first if reads == "before relu" else second).size(2)

    torch.manual_seed(5)
    model = prune(Sized().double(), 0.5)
    compare(model, EVERYTHING, batches((1, 8, 8), 6, 4, classes=5), evaluate_every=3)


def test_norms_behind_a_kept_bias_are_left_to_torch():
    """There ReLU asks for the sign of a rounding error, which must be the masked model's."""
    image = (2, 7, 8)
    assert fusion.tails(trace_flow(Padded(False, False).double(), image))
    assert fusion.tails(trace_flow(Padded(True, True).double(), image))
    assert not fusion.tails(trace_flow(Padded(True, False).double(), image))


def test_norm_without_affine_part():
    torch.manual_seed(3)
    model = prune(Padded(True, affine=False).double(), 0.5)
    compare_steps(model, SGDOptions(lr=1e-3, momentum=0.9), batches((2, 7, 8), 20, 4, classes=5))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.97, 1.0])
@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_densities_from_nothing_to_everything(density, estimator):
    torch.manual_seed(4)
    model = prune(warm_norms(with_estimator(Padded().double(), estimator)), density)
    options = SGDOptions(lr=0.01, momentum=0.5, penalty=0.01)
    compare(model, options, batches((2, 7, 8), 8, 4, classes=5), evaluate_every=3)


@pytest.mark.parametrize("layer", range(5))
def test_a_whole_layer_pruned_and_the_guard_brings_it_back(layer):
    torch.manual_seed(5)
    model = warm_norms(Padded().double())
    target = [m for _, m in threshold_layers(model)][layer]
    nn.init.constant_(target.threshold, 3.0)
    options = SGDOptions(lr=0.01, momentum=0.9, penalty=0.01, collapse_floor=0.1)
    data = list(batches((2, 7, 8), 6, 4, classes=5))
    a, *_ = compare(copy.deepcopy(model), options, data)
    assert min(a.densities.values()) > 0.1  # the guard fired
    a, *_ = compare(model, SGDOptions(lr=0.01, momentum=0.9, penalty=0.01), data, evaluate_every=2)
    assert min(a.densities.values()) < 0.2  # without it the layer stays pruned (noise may revive a filter)


@pytest.mark.parametrize("momentum, weight_decay", [(0.0, 0.0), (0.0, 0.05), (0.9, 0.0), (0.9, 0.05)])
def test_rows_pruned_for_long_move_as_the_eager_update_moves_them(momentum, weight_decay):
    """Pruned rows coast on momentum and weight decay for 60 steps, then lower thresholds revive them."""
    torch.manual_seed(6)
    model = prune(Thin().double(), 0.3)
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            layer.threshold.mul_(torch.where(layer.mask(), 0.5, 2.0))

    def revive(m):
        with torch.no_grad():
            for _, layer in threshold_layers(m):
                layer.threshold.mul_(0.2)

    options = SGDOptions(lr=0.01, momentum=momentum, weight_decay=weight_decay)
    _, b, _, _ = compare(
        model, options, batches((1, 12, 12), 120, 4), start_momentum=0.02, rounds=2, meddle=revive, evaluate_every=17
    )
    assert sum(b.densities.values()) > 4 * 0.5


@pytest.mark.parametrize("far", ["threshold", "weight"])
def test_window_passes_where_the_threshold_is_far(far):
    """Margins beyond 1 on either side: the window estimator lets gradients through, to pruned rows too."""
    torch.manual_seed(7)
    model = warm_norms(with_estimator(Padded(act=nn.GELU).double(), "window"))
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            if far == "threshold":
                layer.threshold[::2] = 1.5
                layer.threshold[1] = 1.02
            else:
                layer.weight[::2] *= 40
                layer.threshold[::3] = 60.0
    options = SGDOptions(lr=0.001, momentum=0.9, weight_decay=1e-3, penalty=2.0)
    compare(model, options, batches((2, 7, 8), 30, 4, classes=5), start_momentum=0.05, evaluate_every=5)


def test_ties_and_zero_rows():
    torch.manual_seed(8)
    model = LeNet5().double()
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            layer.weight[::3] = 0
            layer.weight.flatten(1)[:, ::4] = 0
            layer.threshold.copy_(layer.scores())
            layer.threshold[1::2] *= 0.5
    compare(model, SGDOptions(lr=0.02, momentum=0.9), batches((1, 28, 28), 6, 3))


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_conv4(estimator, multiple):
    torch.manual_seed(9)
    model = prune(warm_norms(with_estimator(Conv4().double(), estimator)), 0.5)
    trainer = CompactTrainer(model, strict=True, verify="never", multiple=multiple)
    a, b, _, _ = compare(model, EVERYTHING, batches((3, 32, 32), 4, 3), evaluate_every=3, trainer=trainer)
    if estimator == "window":
        assert a.macs > 3 * b.macs


@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_resnet(estimator):
    torch.manual_seed(10)
    model = prune(warm_norms(with_estimator(ResNet18(10, width=8).double(), estimator)), 0.5)
    a, b, _, _ = compare(model, EVERYTHING, batches((3, 32, 32), 4, 3), evaluate_every=3)
    if estimator == "window":
        assert a.macs > 1.8 * b.macs


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_vit(estimator, dropout):
    torch.manual_seed(11)
    model = ViT(10, dim=16, depth=2, heads=2, head_dim=8, hidden=24, dropout=dropout).double()
    prune(with_estimator(model, estimator), 0.5)
    a, b, _, _ = compare(model, EVERYTHING, batches((3, 32, 32), 6, 3), evaluate_every=3)
    assert b.macs < a.macs or estimator == "identity"


def test_float32_stays_within_rounding():
    torch.manual_seed(12)
    model = prune(LeNet5(), 0.5)
    options = SGDOptions(lr=0.01, momentum=0.9, penalty=1e-4)
    data = batches((1, 28, 28), 20, 16, dtype=torch.float32)
    compare(model, options, data, tolerance=2e-4, evaluate_every=9)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_parameters_may_move_to_other_memory_between_trainings(density):
    torch.manual_seed(13)
    model = prune(LeNet5().double(), density)

    def swap(m):
        for p in m.parameters():
            p.data = p.data.clone()

    compare(model, EVERYTHING, batches((1, 28, 28), 6, 2), rounds=3, meddle=swap)


def test_evaluation_alone_changes_nothing_but_what_the_guard_resets():
    torch.manual_seed(15)
    model = warm_norms(Padded(bias=True).double())
    nn.init.constant_(model.net[3].threshold, 3.0)
    before = copy.deepcopy(model.state_dict())
    x, y = next(batches((2, 7, 8), 1, 3, classes=5))
    options = SGDOptions(lr=0.1, momentum=0.9, collapse_floor=0.01)
    trainer = CompactTrainer(model, strict=True, verify="never")
    results = []
    for _ in range(2):
        trainer.begin(options, densities={name: 1.0 for name, _ in threshold_layers(model)})
        results.append([trainer.evaluate(x, y)[0].item() for _ in range(2)])
        trainer.finish()
    assert torch.equal(model.net[3].threshold, torch.zeros(20, dtype=torch.float64))
    assert results[0][0] != results[0][1] == pytest.approx(results[1][0], rel=1e-12)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) or key == "net.3.threshold", key


def test_macs_equal_the_flop_counter_of_a_dense_model_of_the_same_size():
    torch.manual_seed(14)
    model = prune(LeNet5().double(), 0.5)
    x, y = next(batches((1, 28, 28), 1, 4))
    trainer = CompactTrainer(model, multiple=1)
    trainer.begin(SGDOptions(lr=0.0))
    trainer.step(x, y)
    # fc4 keeps all ten rows: the gradient of its pruned ones is not zero.
    layers = 10 * 25 * 576, 25 * 10 * 25 * 64, 250 * 25 * 16, 10 * 250
    assert trainer.finish().macs == 4 * (3 * sum(layers) - layers[0])


# -- refusals and fallbacks --------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = ThresholdLinear(4, 4)

    def forward(self, x):
        return self.fc(self.fc(x))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = ThresholdLinear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


class Modal(Twice):
    def forward(self, x):
        return self.fc(x) if self.training else self.fc(x) * 2


def hooked():
    model = nn.Sequential(ThresholdLinear(4, 4))
    model[0].register_forward_hook(lambda *a: None)
    return model


def frozen():
    model = nn.Sequential(ThresholdLinear(4, 4))
    model[0].weight.requires_grad_(False)
    return model


def tied():
    model = nn.Sequential(ThresholdLinear(4, 4), nn.ReLU(), ThresholdLinear(4, 4))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    "build, text",
    [
        (Branch, r"cannot be traced: .*control flow \(in Branch\.forward, test_trainer\.py:\d+\)"),
        (Modal, "different things in train and eval mode, first the end and 'mul'"),
        (hooked, "has hooks"),
        (lambda: ThresholdLinear(4, 4), "the model is one layer alone"),
        (lambda: nn.Sequential(ThresholdLinear(4, 4), CompactModule(tied())), "module '1' is a CompactModule"),
    ],
)
def test_what_cannot_be_traced_runs_masked_and_says_why(build, text, monkeypatch):
    trainer = make_trainer(build())
    assert trainer.engine == "masked"
    assert re.search(text, trainer.reason)
    with pytest.raises(Unsupported, match=text):
        make_trainer(build(), strict=True)
    with pytest.warns(UserWarning, match=text):
        make_trainer(build(), "compact")
    monkeypatch.setenv("SPAFL_STRICT", "1")
    with pytest.raises(Unsupported, match=text):
        make_trainer(build())


@pytest.mark.parametrize(
    "build, text",
    [
        (Twice, r"no threshold layer can be followed (fc: it is used twice)"),
        (frozen, "its weight is frozen"),
        (tied, "it shares a parameter with another module"),
    ],
)
def test_what_the_first_batch_shows_runs_masked_too(build, text):
    model = build()
    twin = copy.deepcopy(model)
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    options = SGDOptions(lr=0.1, momentum=0.9)
    trainer, masked = make_trainer(model), make_trainer(twin, "masked")
    for t in (trainer, masked):
        for _ in range(2):
            t.begin(options)
            t.step(x, y)
            t.evaluate(x, y)
            assert t.finish().steps == 1
    assert trainer.engine == "masked" and text in trainer.reason
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    strict = make_trainer(build(), strict=True)
    strict.begin(options)
    with pytest.raises(Unsupported, match=re.escape(text)):
        strict.step(x, y)


def test_a_loss_that_is_not_finite_shows():
    trainer = CompactTrainer(LeNet5(), strict=True)
    x, y = next(batches((1, 28, 28), 1, 2, dtype=torch.float32))
    trainer.begin(SGDOptions(lr=0.1))
    assert not torch.isfinite(trainer.step(x * float("inf"), y))
    trainer.finish()


def test_the_trainer_explains_itself():
    trainer = make_trainer(ResNet18(10, width=8))
    assert trainer.engine == "compact"
    trainer.begin(SGDOptions(lr=0.1))
    trainer.step(*next(batches((3, 32, 32), 1, 2, dtype=torch.float32)))
    trainer.finish()
    text = trainer.explain()
    assert text.startswith("compact: ")
    assert "layer1.0.conv2: input columns from layer1.0.conv1" in text
    assert "layer1.1.conv1: input columns from conv1, layer1.0.conv2" in text


def test_a_model_changed_under_the_trainer_is_refused():
    model = LeNet5()
    trainer = CompactTrainer(model)
    x, y = next(batches((1, 28, 28), 1, 2, dtype=torch.float32))
    trainer.begin(SGDOptions(lr=0.1))
    trainer.step(x, y)
    with torch.no_grad():
        model.fc3.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"'fc3.weight' was changed by somebody else"):
        trainer.finish()
    trainer.begin(SGDOptions(lr=0.1))  # a new training starts from the model as it is
    trainer.step(x, y)
    assert trainer.finish().steps == 1
    model = LeNet5()
    trainer = CompactTrainer(model)
    model.fc3.weight = nn.Parameter(model.fc3.weight.detach().clone())
    with pytest.raises(RuntimeError, match="parameters of the model were replaced"):
        trainer.begin(SGDOptions(lr=0.1))


@pytest.mark.parametrize("kind", ["plain", "nesterov", "compiled"])
def test_a_layer_comes_back_inside_the_window_while_another_stays_beyond(kind):
    """The guard brings the first back; its thresholds have a gradient in the first step and none afterwards."""
    torch.manual_seed(0)
    layers = ThresholdLinear(6, 8, estimator="window"), nn.ReLU(), ThresholdLinear(8, 5, estimator="window")
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        model[0].threshold.copy_(model[0].scores() + 1.7)
        model[2].threshold.copy_(model[2].scores() - 1.7)
    options = SGDOptions(0.05, 0.9, penalty=0.1, collapse_floor=0.05, nesterov=kind == "nesterov")
    trainer = CompactTrainer(model, strict=True, verify="never", compiled=kind == "compiled")
    compare(model, options, batches((6,), 4, 4, classes=5), trainer=trainer)
