"""CompactModule where people train: inside other modules, in several processes, averaged, saved, compiled."""

import copy
import os
import socket
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import prune
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from spafl_kernels import convert
from spafl_kernels.compact import CompactModule


def plain(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)]
    return prune(convert(nn.Sequential(*layers)).double(), 0.5)


def batch(seed=0, count=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64), torch.arange(count) % 5


def wrapped(how, seed=0):
    module = CompactModule(plain(seed), verify="never")
    return {"alone": lambda: module, "nested": lambda: nn.ModuleDict({"net": module}),
            "deeper": lambda: nn.Sequential(nn.Sequential(module), nn.Linear(5, 2).double()),
            "averaged": lambda: AveragedModel(module)}[how]()  # fmt: skip


@pytest.mark.parametrize("how", ["alone", "nested", "deeper", "averaged"])
@pytest.mark.parametrize("ways", ["state_dict", "checkpoint"])
def test_state_dicts_are_those_of_the_model(how, ways):
    saver, loader = wrapped(how), wrapped(how, 1)
    prefix = {"alone": "", "nested": "net.", "deeper": "0.0.", "averaged": "module."}[how]
    saved = saver.state_dict() if ways == "state_dict" else get_model_state_dict(saver)
    assert {f"{prefix}{key}" for key in plain().state_dict()} <= saved.keys()
    assert not any("model." in key for key in saved)
    saved = {key: value.clone() for key, value in saved.items()}
    given = dict(saved)
    if ways == "state_dict":
        loader.load_state_dict(given)
    else:
        set_model_state_dict(loader, given)
    for (key, value), other in zip(saver.state_dict().items(), loader.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    del given[f"{prefix}3.threshold"]
    given[f"{prefix}unknown"] = torch.zeros(1)
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing.*3\.threshold.*Unexpected.*unknown|Unexpected.*unknown.*Missing"
    ):
        loader.load_state_dict(given)


def test_an_average_of_a_module_is_that_of_the_model():
    module, model = CompactModule(plain(), strict=True, verify="never"), plain()
    averages, x = [AveragedModel(module), AveragedModel(model)], batch()[0]
    for m, average in zip((module, model), averages):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for seed in range(3):
            x, y = batch(seed)
            optimizer.zero_grad()
            F.cross_entropy(m(x), y).backward()
            optimizer.step()
            average.update_parameters(m)
        average.eval()
    with torch.no_grad():
        torch.testing.assert_close(averages[0](x), averages[1](x), rtol=1e-9, atol=1e-11)
    assert averages[0].module.engine == "compact" and averages[0].module.model is not module.model


def test_inference_first_then_training():
    """The order of a check before the first epoch: evaluation in inference mode, training, evaluation again."""
    module, model = CompactModule(plain(), strict=True), plain()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (module, model)]
    for seed in range(4):
        x, y = batch(seed)
        for mode in (torch.inference_mode, torch.no_grad):
            module.eval(), model.eval()
            with mode():
                torch.testing.assert_close(module(x), model(x), rtol=1e-9, atol=1e-11)
        for m, optimizer in zip((module, model), optimizers):
            m.train()
            optimizer.zero_grad()
            F.cross_entropy(m(x), y).backward()
            optimizer.step()
    assert len(list(module._captures)) == 2
    for (name, p), q in zip(model.state_dict().items(), module.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11, msg=name)


class Named(CompactModule):
    pass


def test_a_copy_has_class_attributes_and_hooks():
    module, seen = Named(plain(), verify="never"), []
    module.note = "mine"
    module.register_forward_hook(lambda *_: seen.append(1))
    other = copy.deepcopy(module)
    other(batch()[0])
    assert type(other) is Named and other.note == "mine" and seen == [1]
    assert other.model is not module.model and other._captures.model is other.model


def test_another_model_may_take_the_place_of_the_first():
    x, module = batch()[0], CompactModule(plain(), strict=True, verify="never")
    module(x)
    module.model = plain(1)
    torch.testing.assert_close(module(x), copy.deepcopy(module.model)(x))


def test_threads_wait_for_each_other():
    module, xs = (
        CompactModule(plain().eval(), strict=True, verify="never").eval(),
        [batch(seed)[0] for seed in range(4)],
    )
    right, found = [copy.deepcopy(module.model)(x) for x in xs], {}

    def call(k):
        found[k] = all(torch.allclose(module(xs[k]), right[k]) for _ in range(40))

    threads = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_module_counts_batches_as_the_model_does(reentrant):
    """The second forward stops as soon as the backward pass has what it needs."""
    model, module = plain(), CompactModule(plain(), strict=True, verify="never")
    for run in (model, module):
        x = batch()[0].requires_grad_()
        checkpoint(run, x, use_reentrant=reentrant).square().sum().backward()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-9, atol=1e-11, msg=key)
    for p, q in zip(model.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("how", ["script", "export"])
def test_what_is_exported_is_the_model_not_a_program_for_its_masks(how):
    x, module = batch()[0], CompactModule(plain(), strict=True, verify="never").eval()
    with torch.no_grad():
        made = torch.jit.trace(module, x) if how == "script" else torch.export.export(module, (x,)).module()
        parameters = dict(made.named_parameters())
        for name, p in module.named_parameters():
            if name.endswith("threshold"):
                p.copy_(p.flip(0))
                parameters[name].copy_(p)
        torch.testing.assert_close(made(x), copy.deepcopy(module.model)(x))


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.inner, self.last = nn.Linear(6, 6).double(), inner, nn.Linear(5, 5).double()

    def forward(self, x):
        return self.last(F.relu(self.inner(F.relu(self.first(x)))))


def test_compile_breaks_the_graph_once_and_never_again():
    module = CompactModule(plain(), strict=True, verify="never")
    outer, twin, counter, counts = Around(module), Around(plain()), CompileCounter(), []
    torch._dynamo.reset()
    compiled = torch.compile(outer, backend=counter)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (outer, twin)]
    for seed in range(4):
        x, y = batch(seed)
        for m, run, optimizer in zip((outer, twin), (compiled, twin), optimizers):
            m.zero_grad()
            F.cross_entropy(run(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            for layer in (module.model[3], twin.inner[3]):
                layer.threshold[seed] = 9.0  # other masks
        counts.append(counter.frame_count)
    assert counts == [2] * 4 and module.engine == "compact"
    for p, q in zip(twin.parameters(), outer.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.compile(module, backend=counter)(x), module(x))
    assert counter.frame_count == 2


def steps(model, data, shard=slice(None)):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x[shard]), y[shard]).backward()
        optimizer.step()


def no_norm():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)]
    return prune(convert(nn.Sequential(*layers)).double(), 0.5)


def one_of_two(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    module = CompactModule(no_norm(), strict=True, verify="never")
    parallel = DistributedDataParallel(module)
    steps(parallel, [batch(seed) for seed in range(3)], slice(rank, None, 2))
    saved = {key.removeprefix("module."): value for key, value in parallel.state_dict().items()}
    torch.save((saved, get_model_state_dict(parallel), module.engine), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (port, str(tmp_path)), nprocs=2)
    model = no_norm()
    steps(model, [batch(seed) for seed in range(3)])
    for rank in range(2):
        saved, checkpoint, engine = torch.load(tmp_path / f"{rank}.pt")
        assert engine == "compact" and saved.keys() == checkpoint.keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(saved[key], value, rtol=1e-9, atol=1e-11, msg=key)
            assert torch.equal(checkpoint[key], saved[key])
