"""Packs what a GPU machine without internet needs, in parts of at most 15 MiB, into an ignored folder.

Model folders are written with bfloat16 weights in shards that transformers loads as they are; their other files are
copied. A revision of this repository, for `revisions.py`, is exported without records and trained extras.

    python benchmarks/device_pack.py PAIR [PAIR ...] --out .device_pack
    python benchmarks/device_pack.py --revision f0de3e7 --out .device_pack
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
PART = 15 * 2**20  # bytes
LEFT_OUT = ("benchmarks/results/", "benchmarks/trained/", "docs/", "tests/", "specdec/assets/infill_model/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="a model's folder, or one that holds models' folders")
    parser.add_argument("--revision", help="of this repository, exported to OUT/REVISION")
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".device_pack")
    arguments = parser.parse_args()
    if not arguments.folders and arguments.revision is None:
        parser.error("nothing to pack; name a folder, or --revision")

    for folder in arguments.folders:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder")
        pack(folder, arguments.out / folder.resolve().name)
    if arguments.revision is not None:
        export(arguments.revision, arguments.out / arguments.revision)

    files = [path for path in arguments.out.rglob("*") if path.is_file()]
    largest, total = max(path.stat().st_size for path in files), sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {total / 2**20:.1f} MiB in all, the largest {largest / 2**20:.1f} MiB: {arguments.out}")
    return int(largest > PART)


def pack(source: Path, target: Path) -> None:
    """Copy a folder; weights become bfloat16 shards."""
    target.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] = {}
    for path in sorted(source.iterdir()):
        if path.is_dir():
            pack(path, target / path.name)
        elif path.name.startswith("model") and path.suffix == ".safetensors":
            weights |= load_file(path)
        elif path.name != "model.safetensors.index.json":
            shutil.copyfile(path, target / path.name)
    if weights:
        save_shards(weights, target)


def save_shards(weights: dict[str, Tensor], folder: Path) -> None:
    """transformers' layout of several files. Raises SystemExit for a tensor that is larger than a part."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        tensor = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        if tensor.nbytes > PART - 2**16:
            raise SystemExit(f"{name} has {tensor.nbytes} bytes, more than a part of {PART}; it cannot be packed")
        if size + tensor.nbytes > PART - 2**16:  # room for a header
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes

    names = [f"model-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def export(revision: str, target: Path) -> None:
    """A checkout of the revision that runs, without its tests, pages, records and extras."""
    archive = subprocess.run(["git", "archive", revision], cwd=REPOSITORY, check=True, capture_output=True).stdout
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        kept = [member for member in tar.getmembers() if not f"{member.name}/".startswith(LEFT_OUT)]
        tar.extractall(target, members=kept, filter="data")


if __name__ == "__main__":
    sys.exit(main())
