"""Files of one's own: every reader reads what it should, and names what it cannot."""

import io
import json
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from bounds import bounded
from PIL import Image

from spafl.config import resolve_config
from spafl.data import DataError, load_dataset, readers
from spafl.simulation import run

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(20, 6)), np.arange(20) % 4
FOUR = {"train_x": X[:15], "train_y": Y[:15], "test_x": X[15:], "test_y": Y[15:]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, nowhere_else):
    monkeypatch.chdir(tmp_path)


def load(name, **options):
    return load_dataset(name, **options)


def refusal(name, **options):
    with pytest.raises(DataError) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# -- arrays


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_four_parts(save):
    save("a.npz", **FOUR)
    save("keras.npz", **{"_".join(reversed(name.split("_"))): array for name, array in FOUR.items()})
    for file in ("a.npz", "keras.npz"):
        data = load("npz", file=file)
        assert np.array_equal(data.train_x, X[:15].astype(np.float32)) and data.test_y.tolist() == Y[15:].tolist()
        assert data.classes == 4 and data.shape == (6,)
    data.train_x[0] = 0  # writable


def test_npz_without_a_test_part_is_cut_class_by_class():
    np.savez("a.npz", x=X, y=Y)
    data = load("npz", file="a.npz", test_share=0.4)
    assert np.bincount(data.test_y).tolist() == [2] * 4 and np.bincount(data.train_y).tolist() == [3] * 4
    both = np.concatenate([data.train_x, data.test_x])
    assert sorted(map(bytes, both)) == sorted(map(bytes, X.astype(np.float32)))
    assert np.array_equal(load("npz", file="a.npz", test_share=0.4).test_x, data.test_x)
    assert not np.array_equal(load("npz", file="a.npz", test_share=0.4, seed=1).test_x, data.test_x)


def test_npz_images_of_any_rectangle_and_tokens():
    images = RNG.integers(0, 256, (20, 3, 5, 9), dtype=np.uint8)
    np.savez("i.npz", x=images, y=Y)
    data = load("npz", file="i.npz")
    assert data.shape == (3, 5, 9) and len(data.transform.mean) == 3
    np.savez("t.npz", x=RNG.integers(0, 50, (20, 7)), y=Y)
    tokens = load("npz", file="t.npz")
    assert tokens.train_x.dtype == np.int64 and tokens.transform(torch.from_numpy(tokens.train_x)).dtype == torch.int64


def lying_npz(path, shape, dtype="<f8", content=b""):
    """A npz whose one array announces ``shape``."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": dtype})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x", "y"):
            archive.writestr(f"{name}.npy", header.getvalue() + content)


@pytest.mark.parametrize(
    ("shape", "dtype", "content", "message"),
    [
        ((10**12,), "<f8", b"", "asks for 8000000000000 bytes; at most"),
        ((10**9, 10**9, 10**9), "<f8", b"", "bytes; at most"),
        ((10**6,), "<f8", b"", "other than the 8000000 bytes its header announces"),
        ((1,), "<f8", bytes(1 << 26), "other than the 8 bytes its header announces"),
        ((1,), "|O", b"cos\nsystem\n(S'false'\ntR.", "holds Python objects"),
    ],
)
def test_a_npz_gets_no_more_than_it_has(shape, dtype, content, message):
    lying_npz("a.npz", shape, dtype, content)
    with bounded(30 << 20, seconds=10):
        assert message in refusal("npz", file="a.npz")


def test_what_is_no_npz_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"<html>")
    assert "not a readable .npz" in refusal("npz", file="a.npz")
    np.savez("b.npz", x=X)
    assert "needs train_x, train_y, test_x, test_y, or x, y; has x" in refusal("npz", file="b.npz")
    np.savez("c.npz", x=X, y=Y[:3])
    assert "one entry for each sample" in refusal("npz", file="c.npz")
    assert "npz needs data.file" in refusal("npz")
    assert "there is no file 'none.npz' in the current folder" in refusal("npz", file="none.npz")
    np.savez("d.npz", x=X, y=Y)
    assert "test_share must be between 0 and 1" in refusal("npz", file="d.npz", test_share=1.5)


def test_npy_files_are_mapped(tmp_path):
    (tmp_path / "big").mkdir()
    for part, array in FOUR.items():
        np.save(tmp_path / "big" / f"{part}.npy", array.astype(np.float32) if part.endswith("x") else array)
    data = load("npy", file="big")
    assert isinstance(data.train_x, np.memmap) or isinstance(data.train_x.base, np.memmap)
    assert np.array_equal(data.test_x, X[15:].astype(np.float32))
    (tmp_path / "big" / "test_y.npy").write_bytes(b"x")
    assert "test_y.npy: not a readable .npy" in refusal("npy", file="big")
    (tmp_path / "big" / "test_y.npy").unlink()
    assert "test_y.npy is missing" in refusal("npy", file="big")


# -- tables

TABLE = "size,label,age\n" + "".join(f"{i},{'cat' if i % 2 else 'dog'},{i * i}\n" for i in range(10))


def test_a_table_is_read_and_standardised(tmp_path):
    (tmp_path / "t.csv").write_text("\ufeff" + TABLE, encoding="utf-8")
    data = load("csv", file="t.csv")
    assert data.shape == (2,) and data.classes == 2 and len(data.train_y) == 8
    assert np.abs(data.train_x.mean(0)).max() < 1e-6 and np.abs(data.train_x.std(0) - 1).max() < 1e-6
    raw = load("csv", file="t.csv", standardise=False)
    assert all((x[0] % 2 == 1) == (y == 0) for x, y in zip(raw.train_x, raw.train_y))  # cat before dog
    (tmp_path / "u.csv").write_text(TABLE)
    both = load("csv", file="t.csv", test_file="u.csv")
    assert len(both.train_y) == len(both.test_y) == 10


def test_classes_that_are_numbers_are_in_their_order(tmp_path):
    (tmp_path / "t.csv").write_text("x;y\n" + "".join(f"{i};{label}\n" for i, label in enumerate([10, 9, 2] * 4)))
    data = load("csv", file="t.csv", label="y", delimiter=";", standardise=False)
    assert {int(x[0]) % 3: int(y) for x, y in zip(data.train_x, data.train_y)} == {0: 2, 1: 1, 2: 0}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TABLE, {"label": "class"}, "has no column 'class' (option label); has age, label, size"),
        (TABLE.replace("4,dog,16", "4,dog,old"), {}, "t.csv:6: column 'age' has 'old', no number"),
        (TABLE.replace("4,dog,16", "4,dog,"), {}, "t.csv:6: column 'age' has '', no number"),
        (TABLE.replace("4,dog,16", "4,dog"), {}, "t.csv:6: 2 values for 3 columns"),
        (TABLE.replace("4,dog,16", "4,dog,nan"), {}, "not finite"),
        ("size,label\n", {}, "has no rows"),
        ("", {}, "has no column 'label'"),
        ("label\na\n", {}, "has no rows, or no column beside"),
        ("<!doctype html><html>", {}, "a web page"),
        (TABLE, {"delimiter": ";;"}, "not a readable table"),
    ],
)
def test_tables_that_cannot_be_read_are_named(tmp_path, text, options, message):
    (tmp_path / "t.csv").write_text(text)
    assert message in refusal("csv", file="t.csv", **options)


# -- folders of images


def picture(path, size=(9, 5), mode="RGB", value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


def test_folders_of_images_are_classes(tmp_path):
    for at in range(5):
        picture(tmp_path / "set" / "b" / f"{at}.png", value=at)
        picture(tmp_path / "set" / "a" / f"{at}.png", value=200)
    (tmp_path / "set" / "a" / "notes.txt").write_text("")
    data = load("images", file="set")
    assert data.shape == (3, 5, 9) and data.classes == 2 and len(data.test_y) == 2
    assert (data.train_x[data.train_y == 0][:, 0] == 200).all() and (data.train_x[:, 2] == 255).all()
    small = load("images", file="set", image=4, channels=1)
    assert small.shape == (1, 4, 4)
    for at in range(3):
        picture(tmp_path / "two" / "train" / "a" / f"{at}.png", mode="L")
        picture(tmp_path / "two" / "test" / "a" / f"{at}.png", mode="L")
    assert load("images", file="two").shape == (1, 5, 9)
    picture(tmp_path / "two" / "test" / "b" / "0.png", mode="L")
    assert "has other classes than train: b" in refusal("images", file="two")


def test_images_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    assert "there is no folder 'set'" in refusal("images", file="set")
    (tmp_path / "set" / "a").mkdir(parents=True)
    assert "hold no images" in refusal("images", file="set")
    picture(tmp_path / "set" / "a" / "0.png")
    picture(tmp_path / "set" / "a" / "1.png", size=(5, 9))
    assert "1.png: 5x9 pixels, others have 9x5; data.image resizes them" in refusal("images", file="set")
    (tmp_path / "set" / "a" / "1.png").write_bytes(b"<html>")
    assert "1.png: not a readable image" in refusal("images", file="set")
    (tmp_path / "set" / "a" / "1.png").write_bytes((tmp_path / "set" / "a" / "0.png").read_bytes()[:50])
    assert "1.png: not a readable image" in refusal("images", file="set")
    picture(tmp_path / "set" / "a" / "1.png", size=(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "1.png: not a readable image" in refusal("images", file="set", image=8)
    monkeypatch.setattr(readers, "MAX_ARRAYS", 50)
    assert "take more than 50 bytes" in refusal("images", file="set", image=8)


# -- LEAF


def leaf(folder, part, users):
    (folder / part).mkdir(parents=True, exist_ok=True)
    data = {user: {"x": x, "y": y} for user, (x, y) in users.items()}
    content = {"users": list(users), "num_samples": [len(x) for x, _ in users.values()], "user_data": data}
    (folder / part / "all_data.json").write_text(json.dumps(content))


def test_leafs_users_are_the_natural_clients(tmp_path):
    users = {f"u{k}": (X[4 * k : 4 * k + 4].tolist(), Y[4 * k : 4 * k + 4].tolist()) for k in range(5)}
    leaf(tmp_path / "femnist", "train", users)
    leaf(tmp_path / "femnist", "test", dict(reversed(users.items())))
    data = load("leaf", file="femnist")
    assert np.allclose(data.train_x, X) and data.owners[0].tolist() == [k for k in range(5) for _ in range(4)]
    assert load("leaf", file="femnist", shape=[1, 2, 3]).shape == (1, 2, 3)
    assert "not arrays of one shape" in refusal("leaf", file="femnist", shape=[7])
    config = resolve_config(
        {
            "rounds": 1, "data": {"name": "leaf", "file": "femnist"},
            "partition": {"scheme": "natural", "clients": 3}, "model": {"name": "torch.nn:Linear", "options": {}},
            "algorithm": {"name": "local"}, "sampling": {"clients_per_round": 2},
        }
    )  # fmt: skip
    from spafl.simulation.problem import cut_data

    parts = cut_data(config, data)
    assert [p.tolist() for p in parts.train] == [list(range(4 * k, 4 * k + 4)) for k in range(3)]
    assert [p.tolist() for p in parts.test] == [list(range(16 - 4 * k, 20 - 4 * k)) for k in range(3)]


def test_leafs_texts_are_tokens(tmp_path):
    leaf(tmp_path / "s", "train", {"a": (["to be", "or no"], ["t", "!"]), "b": (["to do"], [" "])})
    leaf(tmp_path / "s", "test", {"a": (["be ox"], ["t"])})
    data = load("leaf", file="s")
    assert data.train_x.dtype == np.int64 and data.shape == (5,) and data.classes == 3
    assert data.test_x[0].tolist()[-1] == data.train_x.max() + 1  # x is not among the known characters


def test_what_is_no_leaf_is_refused(tmp_path):
    (tmp_path / "s" / "train").mkdir(parents=True)
    assert "train: has no samples" in refusal("leaf", file="s")
    (tmp_path / "s" / "train" / "a.json").write_text("[1]")
    assert "a.json: not a LEAF file" in refusal("leaf", file="s")
    leaf(tmp_path / "s", "train", {"a": ([[1], [2]], [1])})
    (tmp_path / "s" / "train" / "a.json").unlink()
    assert "user 'a' has 2 samples and 1 labels" in refusal("leaf", file="s")
    leaf(tmp_path / "s", "train", {"a": ([[1], [2]], [1, 0])})
    assert "test is missing" in refusal("leaf", file="s")


def test_natural_needs_users():
    from spafl.data import PartitionError, partition

    with pytest.raises(PartitionError, match="needs data whose samples belong to users"):
        partition(Y, Y, "natural", 2, np.random.default_rng(0))
    with pytest.raises(PartitionError, match="5 clients, but the data have 4 users"):
        partition(Y, Y, "natural", 5, np.random.default_rng(0), owners=(Y, Y))


# -- Hugging Face: its tables, played by a stand-in, since the package is not among the requirements


class Table:
    def __init__(self, rows):
        self.rows = rows
        self.column_names = list(rows[0])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        return self.rows[at]


def test_saved_hugging_face_data_sets_are_read(tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    pictures = [{"image": Image.new("L", (4, 3), 10 * i), "label": i % 2} for i in range(6)]
    splits = {"train": Table(pictures), "test": Table(pictures[:2])}
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets" in refusal("huggingface", file="saved")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_from_disk=lambda path: splits))
    data = load("huggingface", file="saved")
    assert data.shape == (1, 3, 4) and data.train_x[2, 0, 0, 0] == 20 and data.test_y.tolist() == [0, 1]
    assert "has no column 'fine' (option y); has image, label" in refusal("huggingface", file="saved", y="fine")
    assert "has no split 'all'" in refusal("huggingface", file="saved", train="all")


def saved(folder):
    """Thirty samples as ``datasets`` saves them: the class is the first number's rest."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("flwr_datasets")
    columns = {"x": [[float(i), 1.0] for i in range(30)], "label": [i % 3 for i in range(30)]}
    kinds = {"x": datasets.Sequence(datasets.Value("float32")), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    datasets.DatasetDict({"train": table, "test": table.select(range(5))}).save_to_disk(folder)
    return table


def test_partitioners_of_flwr_datasets_make_the_clients(tmp_path):
    table = saved(tmp_path / "saved")
    from flwr_datasets.partitioner import DirichletPartitioner

    arguments = {"num_partitions": 3, "partition_by": "label", "alpha": 1.0, "min_partition_size": 2, "seed": 5}
    data = load("flwr-datasets", file="saved", partitioner="DirichletPartitioner", arguments=arguments)
    assert data.class_names == ("a", "b", "c") and data.shape == (2,)
    cut = DirichletPartitioner(**arguments)
    cut.dataset = table
    for client in range(3):
        rows = [x[owner == client, 0] for x, owner in zip((data.train_x, data.test_x), data.owners)]
        assert sorted(np.concatenate(rows)) == sorted(x[0] for x in cut.load_partition(client)["x"])
        assert all(len(part) for part in rows)
    assert (data.train_y == data.train_x[:, 0] % 3).all()
    assert "partitioner must be one of ContinuousPartitioner" in refusal("flwr-datasets", file="saved", partitioner="X")
    assert "IidPartitioner cannot cut saved" in refusal("flwr-datasets", file="saved", arguments={"parts": 3})
    assert "arguments must be a table" in refusal("flwr-datasets", file="saved", arguments=3)
    both = load("huggingface", file="saved")
    assert both.class_names == ("a", "b", "c") and len(both.test_y) == 5


def test_without_flwr_datasets_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    assert "needs the package flwr-datasets (pip install" in refusal("flwr-datasets", file="saved")


# -- whole runs


@pytest.mark.parametrize("algorithm", ["spafl", "fedavg"])
def test_a_small_text_model_learns(tmp_path, monkeypatch, algorithm):
    """Tokens 0..9 mean one class, 10..19 the other."""
    y = np.arange(120) % 2
    np.savez("t.npz", x=RNG.integers(0, 10, (120, 6)) + 10 * y[:, None], y=y)
    (tmp_path / "wordnet.py").write_text(
        "import torch\n\nclass Words(torch.nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.words = torch.nn.Embedding(20, 8)\n"
        "        self.head = torch.nn.Linear(8, classes)\n\n"
        "    def forward(self, x):\n"
        "        return self.head(self.words(x).mean(1))\n"
    )
    monkeypatch.setattr("sys.path", list(sys.path))
    config = resolve_config(
        {
            "rounds": 3, "data": {"name": "npz", "file": "t.npz"}, "model": {"name": "wordnet:Words"},
            "algorithm": {"name": algorithm}, "partition": {"scheme": "iid", "clients": 3},
            "training": {"lr": 0.5, "batch_size": 8, "epochs": 4}, "sampling": {"clients_per_round": 3},
            "simulation": {"workers": 1},
        }
    )  # fmt: skip
    final = run(config, tmp_path / "run")["final"]
    sys.modules.pop("wordnet")
    assert final["evaluation"]["accuracy"]["mean"] > 0.9
