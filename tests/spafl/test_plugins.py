"""Models, data, partitions and algorithms of the user's, by import path."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tomli_w
import torch

import spafl
from spafl.cli import main
from spafl.config import load_run_config, resolve_config
from spafl.errors import UserError
from spafl.plugins import Code
from spafl.simulation import run

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, features, hidden: int = 8, label="x"):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, x):
        return self.body(x)
"""
DATA = """
import numpy as np
from pydantic import BaseModel

class Options(BaseModel):
    seed: int = 0
    n: int = 60

def load(options: Options):
    rng = np.random.default_rng(options.seed)
    y = rng.integers(0, 3, options.n)
    x = rng.normal(size=(options.n, 5)) + y[:, None]
    return x[:40], y[:40], x[40:], y[40:]
"""
SPLIT = """
import numpy as np

def draw(labels, clients, rng, shift=0):
    return [(np.arange(len(y)) + shift) % clients for y in labels]
"""
ALGORITHM = """
from spafl.algorithms import BaseOptions
from spafl.algorithms.local import Local

class Options(BaseOptions):
    note: str = "none"

class Own(Local):
    Options = Options
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """``write(net="...")``: modules of these names in the current folder, forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    written = []

    def write(**modules):
        for name, code in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(code).lstrip("\n"))
            written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def own(write):
    """A configuration all of whose parts are the user's."""
    write(own_net=NET, own_data=DATA, own_split=SPLIT, own_algorithm=ALGORITHM)
    return {
        "rounds": 2,
        "data": {"name": "own_data:load", "options": {"seed": 3}},
        "model": {"name": "own_net:Net", "options": {"hidden": 6}},
        "partition": {"scheme": "own_split:draw", "clients": 3, "options": {"shift": 1}},
        "algorithm": {"name": "own_algorithm:Own", "options": {"note": "mine"}},
        "sampling": {"clients_per_round": 2},
        "training": {"epochs": 1, "batch_size": 8},
        "simulation": {"workers": 1, "checkpoint_every": 1},
    }


def save(raw, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(tomli_w.dumps(raw))
    return path


def fails(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("spafl: error: ") and err.count("\n") == 1, err
    return err


def refusal(raw, tmp_path):
    with pytest.raises(UserError) as caught:
        run(resolve_config(raw), tmp_path / "run")
    said = str(caught.value).replace(f"{tmp_path}/", "")
    assert "\n" not in said and not (tmp_path / "run").exists()
    return said


def forget():
    for name in ("own_net", "own_data", "own_split", "own_algorithm"):
        sys.modules.pop(name, None)


def test_a_run_of_the_users_own_parts(own, tmp_path, capsys, monkeypatch):
    """It runs, is reported without an import, and continues and is exported where that is allowed."""
    path, out = save(own, tmp_path), tmp_path / "run"
    assert main(["run", str(path), "--out", str(out), "--no-report", "--quiet"]) == 0
    counts = json.loads((out / "partition.json").read_text())
    assert counts["image"] == [5] and np.sum(counts["train"]) == 40 and np.sum(counts["test"]) == 20
    assert [sum(client) for client in counts["train"]] == [13, 14, 13]  # shifted by one
    stored = load_run_config(out, Code())
    assert stored.algorithm == {"name": "own_algorithm:Own", "note": "mine"} and stored.model.options == {"hidden": 6}

    forget()
    with monkeypatch.context() as without:
        without.setattr("spafl.plugins._import", lambda where, name: pytest.fail(f"{name} was imported"))
        looked_at_without_code(path, out, capsys)

    resume = ["run", str(path), "--out", str(out), "--no-report", "--quiet", "--resume", "--set", "rounds=3"]
    assert main([*resume, "--allow-code"]) == 0
    named = [x for name in ("net", "data", "split", "algorithm") for x in ("--allow-module", f"own_{name}")]
    assert main([*resume[:-1], "rounds=4", *named]) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    allowed = ["--allow-module", "own_net", "--allow-module", "own_algorithm"]
    assert main(["export", str(out), "--client", "1", *allowed]) == 0
    model = spafl.load_run(out, allow_code=["own_net", "own_algorithm"]).model(1)
    x = torch.randn(3, 5)
    exported = torch.export.load(out / "export" / "client-1.pt2").module()
    torch.testing.assert_close(exported(x), model(x))


def looked_at_without_code(path, out, capsys):
    assert main(["report", str(out)]) == 0
    assert spafl.load_run(out).config.algorithm["note"] == "mine"
    with pytest.raises(UserError, match=r"model\.name = 'own_net:Net'"):
        spafl.load_run(out).model(0)
    resume = ["run", str(path), "--out", str(out), "--no-report", "--quiet", "--resume"]
    capsys.readouterr()
    assert "model.name = 'own_net:Net'" in fails(capsys, *resume)
    assert "--allow-module own_data" in fails(capsys, *resume, "--allow-module", "own_net")
    assert "--allow-module own_net" in fails(capsys, "export", out, "--client", 0)


def test_resuming_what_another_module_began_imports_nothing(own, tmp_path, capsys, write):
    path, out = save(own, tmp_path), tmp_path / "run"
    assert main(["run", str(path), "--out", str(out), "--no-report", "--quiet"]) == 0
    stored = (out / "config.toml").read_text()
    write(evil="raise RuntimeError('it ran')")
    (out / "config.toml").write_text(stored.replace("own_net:Net", "evil:Net"))
    said = fails(capsys, "run", path, "--out", out, "--resume", "--allow-code")
    assert "model.name is 'evil:Net' there and 'own_net:Net' here" in said
    assert "evil" not in sys.modules


def test_data_that_changed_are_not_gone_on_with(own, tmp_path, write, capsys):
    path, out = save(own, tmp_path), tmp_path / "run"
    assert main(["run", str(path), "--out", str(out), "--no-report", "--quiet"]) == 0
    forget()
    write(own_split=SPLIT.replace("% clients", "// 2 % clients"))
    said = fails(capsys, "run", path, "--out", out, "--resume", "--allow-code", "--set", "rounds=3")
    assert "holds a run on other data" in said


def test_a_missing_module_is_named(own, tmp_path, capsys):
    path, out = save(own, tmp_path), tmp_path / "run"
    assert main(["run", str(path), "--out", str(out), "--no-report", "--quiet"]) == 0
    forget()
    (tmp_path / "own_net.py").unlink()
    said = fails(capsys, "export", out, "--client", 0, "--allow-code")
    assert "there is no module 'own_net'" in said


def test_plain_models_are_converted_and_pruned(own, tmp_path):
    own["algorithm"] = {"name": "spafl"}
    summary = run(resolve_config(own), tmp_path / "run")
    assert list(summary["final"]["density"]["layers"]) == ["body.1", "body.3"]


@pytest.mark.slow
def test_workers_find_the_code_too(own, tmp_path):
    one = run(resolve_config(own), tmp_path / "one")
    own["simulation"]["workers"] = 2
    two = run(resolve_config(own), tmp_path / "two")
    assert one["final"]["evaluation"] == two["final"]["evaluation"]


def test_classes_themselves_are_names(own, tmp_path):
    config = resolve_config(own)
    import own_net

    own["model"]["name"] = own_net.Net
    assert resolve_config(own) == config

    class Local(own_net.Net):
        pass

    own["model"]["name"] = Local
    with pytest.raises(UserError, match=r"model\.name: .*Local.* cannot be found again"):
        resolve_config(own)


NOTEBOOK = """
from torch import nn
import spafl

class Net(nn.Module):
    def __init__(self, classes, features):
        super().__init__()
        self.layer = nn.Linear(features, classes)

    def forward(self, x):
        return self.layer(x.flatten(1))

result = spafl.run({
    "rounds": 1, "data": {"name": "synthetic", "train": 20, "test": 10, "classes": 2}, "model": {"name": Net},
    "algorithm": {"name": "spafl"}, "partition": {"scheme": "iid", "clients": 2}, "sampling": {"clients_per_round": 2},
}, "run")
print(type(result.model(0)).__name__, result.config.model.name)
"""


@pytest.mark.slow
def test_classes_of_a_notebook_work_there_and_say_why_not_elsewhere(tmp_path, capsys):
    """Standard input is as a notebook is: ``__main__`` without a file."""
    done = subprocess.run([sys.executable, "-"], input=NOTEBOOK, text=True, capture_output=True, cwd=tmp_path)
    assert done.stdout.split() == ["Net", "__main__:Net"], done.stderr
    command = [sys.executable, "-m", "spafl.cli", "export", "run", "--client", "0", "--allow-code"]
    done = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "model.name: classes of a notebook or script (__main__) exist only in its own process" in done.stderr


# -- what does not fit


def test_options_are_held_to_the_signature(own, tmp_path):
    own["model"]["options"] = {"hiden": 3}
    said = refusal(own, tmp_path)
    assert said == (
        "model.options: Net (own_net.py:3) has no option 'hiden' (did you mean 'hidden'?); its options: hidden, label"
    )
    for wrong in (True, "3", 2.5):
        own["model"]["options"] = {"hidden": wrong}
        assert "model.options.hidden: input should be a valid integer" in refusal(own, tmp_path)
    own["model"]["options"] = {"label": 3}
    assert "model.options.label: input should be a valid string" in refusal(own, tmp_path)
    own["model"]["options"] = {"classes": 3}
    assert "has no option 'classes'" in refusal(own, tmp_path)
    own["model"]["options"] = {}
    own["data"]["options"] = {"seed": "x"}
    assert "data.options.seed: " in refusal(own, tmp_path) and "Options (own_data.py:4)" in refusal(own, tmp_path)
    own["data"]["options"] = {}
    own["algorithm"]["options"] = {"noted": "x"}
    assert "unknown key algorithm.noted; did you mean algorithm.note?" in refusal(own, tmp_path)
    own["algorithm"] = {"name": "own_algorithm:Own", "note": "a", "options": {"note": "b"}}
    assert "algorithm.options.note: it is set in [algorithm] too" in refusal(own, tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pass", "model.name: Net (bad.py:2) has no forward"),
        ("def forward(self, x): return x[:, :2]", "must return (n, 3) for n samples; for 2 it returned (2, 2)"),
        ("def forward(self, x): return [x]", "for 2 it returned a list"),
        ("def forward(self, x): return x.mean(0)[:3]", "for 2 it returned (3,)"),
        ("def forward(self, x): return x @ x", "Net (bad.py:2) does not take inputs of shape (n, 5): RuntimeError"),
        ("def forward(self, x, y): return x", "does not take inputs of shape (n, 5): TypeError"),
        ("def __init__(self): raise OSError('no\\nfile')", "Net (bad.py:2) failed: OSError: no file (bad.py:3)"),
        ("def __init__(self, depth): pass", "Net (bad.py:2) needs 'depth', which is neither an option"),
    ],
)
def test_models_that_do_not_fit_are_refused(own, tmp_path, write, body, message):
    write(bad=f"from torch import nn\nclass Net(nn.Module):\n    {body}\n")
    own["model"] = {"name": "bad:Net"}
    assert message in refusal(own, tmp_path)


def test_other_objects_are_no_models(own, tmp_path, write):
    write(bad="def build():\n    return 3\n\nvalue = 4\n")
    own["model"] = {"name": "bad:build"}
    assert refusal(own, tmp_path) == "model.name: build (bad.py:1) must return an nn.Module; it returned a int"
    own["model"] = {"name": "bad:value"}
    assert "cannot be called" in refusal(own, tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("return 3", "the loader must return a Dataset"),
        ("return {'train_x': x}", "the loader's dict has no 'train_y'"),
        ("return x, y, x", "it returned a tuple"),
        ("return x, y[:-1], x, y", "train_y must be int64 (6,) like train_x"),
        ("return x, y - 1, x, y", "train labels must be 0..2; got -1..1"),
        ("return x, y * 1.0, x, y", "train_y and test_y must be of one kind, classes (whole numbers) or"),
        ("return x, x, x, x[:, :2]", "train_y and test_y must be of one kind, classes (whole numbers) or"),
        ("return x, x[None], x, y", "train_y must be classes, whole numbers (n,), or numbers to predict, floats (n,)"),
        ("return x * np.nan, y, x, y", "train_x has a value that is not finite"),
        ("return x[:0], y[:0], x, y", "the train part is empty"),
        ("return x, y, x[:, :4], y", "differ in shape"),
        ("return x, y, x.astype(int), y", "differ in dtype"),
        ("return x.astype(str), y, x, y", "train_x must be an array of numbers"),
        ("return [1, 2], [3]", "the train part is no data set of (x, y) samples"),
        ("1 / 0", "load (bad.py:2) failed: ZeroDivisionError: division by zero (bad.py:4)"),
    ],
)
def test_data_that_do_not_fit_are_refused(own, tmp_path, write, code, message):
    made = "x, y = np.ones((6, 5)), np.array([0, 1, 2] * 2)"
    write(bad=f"import numpy as np\ndef load():\n    {made}\n    {code}\n")
    own["data"] = {"name": "bad:load"}
    said = refusal(own, tmp_path)
    assert message in said and "load (bad.py:2)" in said


def test_torch_data_sets_tensors_and_images_are_taken(own, tmp_path, write):
    write(
        bad="""
        import numpy as np, torch
        from torch.utils.data import TensorDataset
        x, y = torch.arange(48.).reshape(6, 8), torch.tensor([0, 1] * 3)

        def pair():
            return TensorDataset(x, y), TensorDataset(x[:2], y[:2])

        def tensors():
            return {"train_x": x, "train_y": y, "test_x": x[:2], "test_y": y[:2]}

        def images():
            return x.byte().reshape(6, 2, 4), y, x.byte().reshape(6, 2, 4), y
        """
    )
    pair, tensors, images = (spafl.data.load_dataset(f"bad:{name}") for name in ("pair", "tensors", "images"))
    assert np.array_equal(pair.train_x, tensors.train_x) and pair.train_y.tolist() == [0, 1] * 3
    assert pair.train_x.dtype == np.float32 and pair.shape == (8,) and pair.classes == 2
    assert images.shape == (1, 2, 4) and len(images.transform.mean) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("return 3", "draw (bad.py:2) must return the owners"),
        ("return [np.zeros(40, int), np.full(20, 3)]", "an owner in 0..2"),
        ("return [np.zeros(39, int), np.zeros(20, int)]", "each of 40 samples an owner"),
        ("return [np.zeros(40), np.zeros(20)]", "each of 40 samples an owner"),
        ("raise KeyError('x')", "draw (bad.py:2) failed: KeyError: 'x' (bad.py:3)"),
        ("return Partition([[0]] * 3, [[0]] * 2)", "lists 2 clients under test; partition.clients is 3"),
        ("return Partition([[40]] * 3, [[0]] * 3)", "train of client 0 has sample 40, not in 0..39"),
    ],
)
def test_partitions_that_do_not_fit_are_refused(own, tmp_path, write, code, message):
    write(bad=f"import numpy as np; from spafl.data import Partition\ndef draw(labels, clients, rng):\n    {code}\n")
    own["partition"] = {"scheme": "bad:draw", "clients": 3}
    assert message in refusal(own, tmp_path)


# -- partitions from files and sizes


def test_a_partition_is_read_from_a_file(own, tmp_path):
    listed = {"train": [[5, 3], [0, 3], list(range(10, 40))], "test": [[1], [0], [1, 2]]}
    (tmp_path / "split.json").write_text(json.dumps(listed))
    own["partition"] = {"file": "split.json", "clients": 3}
    config = resolve_config(own)
    assert config.partition.scheme == "file"
    run(config, tmp_path / "run")
    counts = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert [sum(c) for c in counts["train"]] == [2, 2, 30] and [sum(c) for c in counts["test"]] == [1, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "split.json: is no JSON"),
        ("[" * 100_000, "split.json: is no JSON"),
        ("[]", "split.json: must hold"),
        ('{"train": [[0]], "test": [[0]]}', "lists 1 clients under train; partition.clients is 2"),
        ('{"train": [[0], [0.5]], "test": [[0], [0]]}', "train of client 1 is no list of sample numbers"),
        ('{"train": [[0], [[1], [1, 2]]], "test": [[0], [0]]}', "train of client 1 is no list"),
        ('{"train": [[0], [true]], "test": [[0], [0]]}', "train of client 1 is no list"),
        ('{"train": [[0], "x"], "test": [[0], [0]]}', "train of client 1 is no list"),
        ('{"train": [[0], [-1]], "test": [[0], [0]]}', "train of client 1 has sample -1"),
        ('{"train": [[0], [40]], "test": [[0], [0]]}', "train of client 1 has sample 40, not in 0..39"),
        ('{"train": [[0], [4, 5, 4]], "test": [[0], [0]]}', "train of client 1 has sample 4 twice"),
        ('{"train": [[0], []], "test": [[0], [0]]}', "client 1 has 0 train samples; partition.min_train is 1"),
        ('{"train": [[0], [1]], "test": [[], [0]]}', "client 0 has 0 test samples; partition.min_test is 1"),
    ],
)
def test_a_partition_file_that_is_none_is_refused(own, tmp_path, content, message):
    (tmp_path / "split.json").write_text(content)
    own["partition"] = {"file": "split.json", "clients": 2}
    assert message in refusal(own, tmp_path)


def test_a_file_and_a_scheme_need_each_other(own, tmp_path):
    own["partition"] = {"scheme": "file", "clients": 2}
    assert "scheme = 'file' and file = 'split.json' need each other" in refusal(own, tmp_path)
    own["partition"] = {"scheme": "iid", "file": "split.json", "clients": 2}
    assert "need each other" in refusal(own, tmp_path)
    own["partition"] = {"file": "none.json", "clients": 2}
    assert "none.json: cannot be read: No such file" in refusal(own, tmp_path)


def test_sizes_are_read_from_toml(own, tmp_path):
    own["partition"] = {"scheme": "size", "clients": 3, "sizes": [1, 1, 2.0]}
    path = save(own, tmp_path)
    assert main(["run", str(path), "--out", str(tmp_path / "run"), "--no-report", "--quiet"]) == 0
    counts = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert [sum(c) for c in counts["train"]] == [10, 10, 20]
    own["partition"]["sizes"] = [1, 2]
    assert "sizes must be 3 positive numbers" in refusal(own, tmp_path / "no")
    own["partition"]["sizes"] = [1, 2, True]
    assert "partition.sizes: input should be a valid number" in refusal(own, tmp_path / "no")
