import sys
from pathlib import Path

import pytest

from spafl.algorithms import BaseOptions
from spafl.config import load_config, parse_assignment, resolve_config
from spafl.errors import UserError


def refusal(tables):
    with pytest.raises(UserError) as caught:
        resolve_config(tables)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_variant_is_laid_under_the_file(small):
    config = resolve_config(small)
    assert config.algorithm["importance"] == "before-training"
    assert config.algorithm["penalty"] == 0.05  # the file wins
    assert config.training.momentum == 0.9 and config.training.lr == 0.02


def test_published_variants_carry_their_training(small):
    small["algorithm"] = {"name": "spafl", "variant": "cifar100"}
    del small["training"]
    config = resolve_config(small)
    assert (config.training.lr, config.training.lr_decay, config.training.lr_floor) == (0.01, 0.993, 0.0001)
    assert config.training.max_grad_norm == 15.0 and config.training.drop_last
    assert config.sampling.stream == "published-cifar100"


@pytest.mark.parametrize(
    ("variant", "pixels", "augment"),
    [
        ("fmnist", "raw", "none"),
        ("cifar10", "raw", "none"),
        ("cifar100", "standard", None),
        ("paper", "standard", None),
    ],
)
def test_the_input_pipeline_is_part_of_a_variant(small, variant, pixels, augment):
    del small["data"]["pixels"]
    small["algorithm"] = {"name": "spafl", "variant": variant}
    data = resolve_config(small).data
    assert (data.pixels, data.augment) == (pixels, augment)
    small["data"]["pixels"] = "unit"
    assert resolve_config(small).data.pixels == "unit"
    small["data"]["pixels"] = "bytes"
    assert "data.pixels: one of standard, unit, raw; got 'bytes'" in refusal(small)


def test_the_resolved_configuration_reads_back_equal(small, tmp_path):
    small["algorithm"]["collapse_floor"] = "off"
    config = resolve_config(small)
    assert config.algorithm["collapse_floor"] is None
    (tmp_path / "c.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "c.toml") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainng": {}}, "unknown key trainng; did you mean training?"),
        ({"training": {"learning_rat": 1}}, "unknown key training.learning_rat; did you mean training."),
        ({"training": {"epoch": 1}}, "unknown key training.epoch; did you mean training.epochs?"),
        ({"training": {"lr": "fast"}}, "training.lr: input should be a valid number"),
        ({"training": {"lr": -1}}, "training.lr: input should be greater than 0; got -1"),
        ({"training": {"lr": float("nan")}}, "training.lr: "),
        ({"rounds": 0}, "rounds: input should be greater than or equal to 1; got 0"),
        ({"rounds": 2.5}, "rounds: "),
        ({"algorithm": {"name": "spalf"}}, "did you mean 'spafl'?"),
        (
            {"algorithm": {"name": "spafl", "penalti": 1}},
            "unknown key algorithm.penalti; did you mean algorithm.penalty?",
        ),
        ({"algorithm": {"name": "spafl", "variant": "mnist"}}, "algorithm.variant: one of fmnist, cifar10"),
        ({"algorithm": {"name": "spafl", "estimator": "relu"}}, "algorithm.estimator: one of identity, window"),
        ({"algorithm": {}}, "configuration needs [algorithm]"),
        ({"model": {"name": "lenet"}}, "model.name: unknown name 'lenet'; did you mean 'lenet5'?"),
        ({"data": {"name": "digit"}}, "data.name: unknown name 'digit'; did you mean 'digits'?"),
        ({"partition": {"scheme": "dirichlett"}}, "partition.scheme: unknown name"),
        ({"sampling": {"clients_per_round": 6}}, "6 clients cannot be sampled from partition.clients = 5"),
        ({"simulation": {"engine": "fast"}}, "simulation.engine: one of auto, masked, compact; got 'fast'"),
    ],
)
def test_mistakes_get_one_line(small, change, message):
    for section, value in change.items():
        if isinstance(value, dict) and value and section != "algorithm":
            small[section] = {**small.get(section, {}), **value}
        else:
            small[section] = value
    assert message in refusal(small)


def test_missing_sections_are_named(small):
    del small["model"]
    assert refusal(small) == "missing key model"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")


def test_assignments():
    assert parse_assignment("training.lr=0.5") == {"training": {"lr": 0.5}}
    assert parse_assignment("model.name=vit") == {"model": {"name": "vit"}}
    assert parse_assignment("training.drop_last=true") == {"training": {"drop_last": True}}
    with pytest.raises(UserError, match=r"section\.key=value"):
        parse_assignment("training.lr")
    assert parse_assignment("training.lr=.5") == {"training": {"lr": 0.5}}
    assert parse_assignment("training.lr=-5.e-1") == {"training": {"lr": -0.5}}
    assert parse_assignment("model.name=.5.") == {"model": {"name": ".5."}}


@pytest.mark.parametrize(
    "text", ["training.lr=0.5\nrounds=7", "training.lr=0.5\r", "name=a\0b", "a.b.c.d.e.f.g.h.i=1", "x=" + "[" * 5000]
)
def test_assignments_that_hide_something_are_refused(text):
    with pytest.raises(UserError, match="--set") as caught:
        parse_assignment(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


# -- a value is what it is written as


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("rounds", True, "rounds: input should be a valid integer; got true"),
        ("rounds", "1", "rounds: input should be a valid integer; got '1'"),
        ("rounds", 1e30, "rounds: "),
        ("rounds", 10**7 + 1, "less than or equal to 10000000"),
        ("training.lr", True, "training.lr: input should be a valid number; got true"),
        ("training.lr", "0.1", "training.lr: input should be a valid number; got '0.1'"),
        ("training.lr", float("inf"), "training.lr: input should be a finite number; got inf"),
        ("training.lr", 1e-320, "training.lr: input should be 1e-30 or more, or it is 0 in float32"),
        ("training.lr_floor", float("inf"), "training.lr_floor: input should be a finite number"),
        ("training.max_grad_norm", float("inf"), "training.max_grad_norm: input should be a finite number"),
        ("training.max_grad_norm", True, "training.max_grad_norm: input should be a valid number; got true"),
        ("training.drop_last", 1, "training.drop_last: true or false; got 1"),
        ("training.drop_last", "yes", "training.drop_last: true or false; got 'yes'"),
        ("training.batch_size", 1e30, "training.batch_size: "),
        ("training.epochs", 10**9, "training.epochs: "),
        ("evaluation.every", 1e30, "evaluation.every: "),
        ("simulation.workers", 10**30, "simulation.workers: "),
        ("simulation.workers", 257, "simulation.workers: input should be less than or equal to 256"),
        ("simulation.checkpoint_every", 10**18, "simulation.checkpoint_every: "),
        ("simulation.keep_checkpoints", 10**18, "simulation.keep_checkpoints: "),
        ("partition.max_draws", 10**18, "partition.max_draws: "),
        ("partition.alpha", 1e308, "partition.alpha: input should be less than or equal to 1000000"),
        ("partition.alpha", 1e-300, "partition.alpha: input should be greater than or equal to 0.000001"),
        ("partition.clients", 10**12, "partition.clients: "),
        ("data.classes", 10**9, "data.classes: "),
        ("data.train", 10**12, "data.train: "),
        ("data.seed", 10**4000, "data.seed: "),
        ("seed", 10**4000, "got a whole number of 13288 bits"),
        ("algorithm.collapse_floor", True, "algorithm.collapse_floor: input should be a valid number; got true"),
        ("algorithm.collapse_floor", 1.0, "algorithm.collapse_floor: input should be less than 1; got 1.0"),
        ("algorithm.penalty", 1e308, "algorithm.penalty: input should be less than or equal to 1000000"),
        ("algorithm.penalty", "0.1", "algorithm.penalty: input should be a valid number; got '0.1'"),
        ("algorithm.prune_head", 1, "algorithm.prune_head: one of true, false, as-built; got 1"),
        ("name", "..", "name: a name of a folder below runs/ is needed"),
        ("name", ".", "name: a name of a folder"),
        ("name", "", "name: "),
        ("name", "/tmp/x", "name: a name of a folder"),
        ("name", "../esc", "name: a name of a folder"),
        ("name", "a/../../b", "name: a name of a folder"),
        ("name", "a\0b", "name: a name of a folder"),
        ("name", "a\nb", "name: a name of a folder"),
        ("name", "x" * 256, "name: a name of a folder"),
        ("training", 3, "training: input should be a table; got 3"),
        ("model.name", "x" * 10_000, "... (10002 characters)"),
    ],
)
def test_values_of_another_kind_or_size_are_refused(small, setting, value, message):
    section, _, key = setting.rpartition(".")
    (small.setdefault(section, {}) if section else small)[key] = value
    said = refusal(small)
    assert message in said and len(said) < 400


def test_numbers_may_be_written_either_way(small):
    small["training"].update(lr=1, batch_size=16.0)
    small["name"] = "group/one"
    config = resolve_config(small)
    assert config.training.lr == 1.0 and config.training.batch_size == 16 and config.name == "group/one"


def test_options_of_an_algorithm_are_held_to_the_same(small):
    class Options(BaseOptions):
        rates: tuple[float, ...] = (1.0,)
        pairs: tuple[tuple[int, str], ...] = ()
        label: str | None = None
        limit: int | float = 1

    assert Options(rates=[1, 0.5], pairs=[[1, "a"]], label="x").rates == (1.0, 0.5)
    for wrong in ({"rates": [1, True]}, {"rates": ["1"]}, {"pairs": [[True, "a"]]}, {"label": 3}, {"limit": True}):
        with pytest.raises(ValueError):
            Options(**wrong)


# -- files


def test_a_byte_order_mark_and_umlauts_are_read(small, tmp_path):
    small["name"] = "läuft"
    path = tmp_path / "ü.toml"
    path.write_bytes(b"\xef\xbb\xbf" + resolve_config(small).to_toml().encode())
    assert load_config(path).name == "läuft"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = " + b"[" * 5000, "nested too deeply"),
        (b"a = " + b"[" * 300 + b"]" * 300, "unknown key|needs"),
        (b"seed = 1" + b"0" * 5001, "not valid TOML: Exceeds the limit"),
        (b"a = '\xff'", "not valid TOML: 'utf-8' codec"),
        (b"a = 'x\0y'", "not valid TOML"),
        (b"#" * (1 << 20) + b"#", "more than 1048576 bytes"),
        (b"[" + b"a." * 3000 + b"b]\nc = 1", "nested too deeply|unknown key|needs"),
    ],
)
def test_hostile_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "path", ["c.toml/below", "x" * 300 + ".toml", "nul\0.toml", "/proc/self/mem", "/dev/zero"], ids=repr
)
def test_paths_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text("")
    with pytest.raises(UserError, match=r"configuration file|not valid TOML"):
        load_config(Path(path))


# -- algorithms by import path


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (None, "..:x", "an import path has the form module:name; got '..:x'"),
        (None, ".x:Y", "an import path has the form"),
        (None, "a:", "an import path has the form"),
        (None, "a:b:c", "an import path has the form"),
        (None, "nul\0:x", "an import path has the form"),
        (None, "no_such_module_here:X", "there is no module 'no_such_module_here' in"),
        (None, "spafl.algorithms:Algorithm", "does not define broadcast, client_state"),
        (None, "spafl.algorithms:LocalTraining", "is not a subclass of spafl.algorithms.Algorithm"),
        (None, "spafl.algorithms:SpaFl", "did you mean 'SpaFL'?"),
        ("class X:\n  pass", "own_{}:X", "X (own_{}.py:1) is not a subclass"),
        (
            "import no_such_thing",
            "own_{}:X",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_thing'",
        ),
        ("x = 1\n\nx = = 2", "own_{}:X", "cannot be imported: SyntaxError: invalid syntax (own_{}.py:3)"),
        ("\n1 / 0", "own_{}:X", "ZeroDivisionError: division by zero (own_{}.py:2)"),
        ("raise SystemExit(3)", "own_{}:X", "SystemExit: 3 (own_{}.py:1)"),
        ("raise ValueError('a\\nb')", "own_{}:X", "ValueError: a b (own_{}.py:1)"),
        ("y = 1", "own_{}:X", "has no 'X'"),
    ],
)
def test_algorithms_that_cannot_be_imported_say_why(small, tmp_path, monkeypatch, code, name, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    own = f"n{abs(hash((code, name)))}"
    if code is not None:
        (tmp_path / f"own_{own}.py").write_text(code)
    small["algorithm"] = {"name": name.format(own)}
    said = refusal(small).replace(f"{tmp_path}/", "")
    assert said.startswith("algorithm.name: ") and message.format(own) in said, said
