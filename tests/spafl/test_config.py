import pytest

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
