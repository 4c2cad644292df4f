"""Reads every tensor of the safetensors files of one directory in each way that the library has, and compares with another.

compare_tensors.py SOURCE MOUNTED prints the number of tensors. File names are allowed to differ, tensor names are not.
"""

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file


def by_safe_open(directory: Path) -> dict:
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                assert name not in tensors, f"{name} is in two files"
                tensors[name] = opened.get_tensor(name)
    return tensors


def by_load_file(directory: Path) -> dict:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def by_bytes(directory: Path) -> dict:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load(file.read_bytes()).items()}


def main() -> None:
    source, mounted = Path(sys.argv[1]), Path(sys.argv[2])
    wanted = by_safe_open(source)
    assert wanted, "the source has no tensors"
    for reader in (by_safe_open, by_load_file, by_bytes):
        found = reader(mounted)
        assert found.keys() == wanted.keys(), f"{reader.__name__}: {found.keys() ^ wanted.keys()}"
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), f"{reader.__name__}: {name}"
    print(len(wanted))


main()
