"""Data sets as tensors, their cut into clients, and who sees which image."""

from gidef.data import partition
from gidef.data.images import Dataset, Images, as_float, check_dataset
from gidef.data.load import available, find_local, load_dataset
from gidef.data.medmnist_sets import Entry
from gidef.data.partition import class_counts, summary
from gidef.data.roles import Roles, split_roles
from gidef.data.synthetic import synthetic_blood_cells
from gidef.data.webdataset_shards import places_of_clients, write_webdataset

__all__ = [
    "Dataset",
    "Entry",
    "Images",
    "Roles",
    "as_float",
    "available",
    "check_dataset",
    "class_counts",
    "find_local",
    "load_dataset",
    "partition",
    "places_of_clients",
    "split_roles",
    "summary",
    "synthetic_blood_cells",
    "write_webdataset",
]
