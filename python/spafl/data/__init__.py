"""Data sets as stored, what turns them into model input, and their partition over clients."""

from functools import partial

from .builtin import load_digits, load_synthetic
from .cifar import FORMS, load_cifar
from .dataset import DATASETS, DataError, Dataset, as_dataset, blank, dataset_options, load_dataset, register_dataset
from .idx import SOURCES, load_idx
from .partition import (
    MAX_ALPHA,
    MIN_ALPHA,
    SCHEMES,
    Partition,
    PartitionError,
    Scheme,
    partition,
    read_partition,
    register_scheme,
)
from .readers import load_csv, load_flwr_datasets, load_huggingface, load_images, load_leaf, load_npy, load_npz
from .transform import Transform

__all__ = [
    "DATASETS",
    "MAX_ALPHA",
    "MIN_ALPHA",
    "SCHEMES",
    "DataError",
    "Dataset",
    "Partition",
    "PartitionError",
    "Scheme",
    "Transform",
    "as_dataset",
    "blank",
    "dataset_options",
    "load_dataset",
    "partition",
    "read_partition",
    "register_dataset",
    "register_scheme",
]

register_dataset("digits", load_digits)
register_dataset("synthetic", load_synthetic)
for _name in SOURCES:
    register_dataset(_name, partial(load_idx, _name))
for _name, _load in (
    ("npz", load_npz),
    ("npy", load_npy),
    ("csv", load_csv),
    ("images", load_images),
    ("leaf", load_leaf),
    ("huggingface", load_huggingface),
    ("flwr-datasets", load_flwr_datasets),
):
    register_dataset(_name, _load)
for _name in FORMS:
    register_dataset(_name, partial(load_cifar, _name))
