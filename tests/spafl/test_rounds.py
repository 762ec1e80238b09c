"""A round that is cut short anywhere leaves the run as it was at the end of the round before."""

import copy

import pytest
import torch

from spafl.simulation.loop import Simulation
from spafl.simulation.pool import Pool
from spafl.simulation.runfolder import RunFolder
from spafl.simulation.tasks import Worker
from spafl_kernels.compact import CompactTrainer


def state(simulation):
    rows = [{n: t.clone() for n, t in simulation.store.load(k).items()} for k in range(simulation.clients)]
    server = {name: tensor.clone() for name, tensor in simulation.server.items()}
    return simulation.round, server, rows, copy.deepcopy(simulation.log), set(simulation.dirty)


def assert_same(a, b):
    assert a[0] == b[0] and a[3:] == b[3:]
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])
    assert all(torch.equal(x[name], y[name]) for x, y in zip(a[2], b[2], strict=True) for name in x)


@pytest.mark.parametrize("where", ["train", "merge", "evaluate"])
def test_a_round_cut_short_never_was(small_config, tmp_path, monkeypatch, where):
    # This variant announces after every round, so clients change in evaluations too.
    config = small_config(algorithm={"variant": "cifar10"})
    states = []
    for name in ("whole", "cut"):
        folder = RunFolder(tmp_path / name, resume=False)
        simulation = Simulation(config, folder, quiet=True)
        with Pool(simulation.worker_setup(), 1) as pool:
            simulation.run_round(pool, 0)
            if name == "cut":
                before, calls = state(simulation), []
                original = getattr(simulation.algorithm, where)

                def cut(*args, original=original, calls=calls):
                    result = original(*args)
                    calls.append(1)
                    if where == "merge" or len(calls) == 2:
                        raise KeyboardInterrupt
                    return result

                monkeypatch.setattr(simulation.algorithm, where, cut)
                with pytest.raises(KeyboardInterrupt):
                    simulation.run_round(pool, 1)
                monkeypatch.undo()
                assert_same(state(simulation), before)
            simulation.run_round(pool, 1)
        states.append(state(simulation))
        simulation.store.close()
        folder.close()
    assert_same(*states)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_parent_verifies_the_compact_engine_for_its_workers(small_config, tmp_path, monkeypatch, workers):
    config = small_config(simulation={"workers": workers, "engine": "compact"})
    folder = RunFolder(tmp_path / "run", resume=False)
    simulation = Simulation(config, folder, quiet=True)
    verified, original = [], CompactTrainer._differs
    monkeypatch.setattr(CompactTrainer, "_differs", lambda *a: verified.append(1) or original(*a))
    setup = simulation.worker_setup()
    assert len(verified) == workers - 1
    with Pool(setup, 1) as pool:  # one of them
        simulation.run_round(pool, 0)
    assert len(verified) == 1
    other = Worker(setup).resident._make_trainer(copy.deepcopy(setup.model))  # the verdict is not about this one
    other.verdicts_on(torch.zeros(4, 1, 28, 28))
    assert len(verified) == 2
    simulation.store.close()
    folder.close()
