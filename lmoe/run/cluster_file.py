"""clusters.safetensors: into which cluster each prompt of a run was put, so that a run that goes on need not fit anew.

Shapes: K clusters, D hidden, M different prompts.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lmoe.adapter.stored_base import KINDS
from lmoe.adapter.tensor_file import stored_metadata, stored_tensors
from lmoe.backbones.fingerprint import BaseFingerprint
from lmoe.files.run_folder import CLUSTERS_FILE
from lmoe.files.small_file import Reader
from lmoe.files.wording import quoted
from lmoe.files.write import write_whole
from lmoe.run.clusters import PromptClusters

FORMAT_VERSION = 1
ABOUT = "lmoe_clusters"
"""The only entry of the file's metadata: several would make its bytes random."""
TYPES = {
    "centroids": torch.float32,
    "mean": torch.float32,
    "std": torch.float32,
    "digests": torch.int64,
    "clusters": torch.int64,
    "distances": torch.float32,
}
READER = Reader(cure="put back the file that the run has written, or remove it to fit the clusters anew", what="it")


def write_clusters(clusters: PromptClusters, base: BaseFingerprint, seed: int, run_dir: Path) -> None:
    """Write the file whole.

    Args:
        base: whose states they are of.
        seed: of the run.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    fingerprint = {"digest": base.digest, **{kind: getattr(base, kind) for kind in KINDS}}
    about = json.dumps({"format_version": FORMAT_VERSION, "seed": seed, "base": fingerprint}, sort_keys=True)
    tensors = {name: getattr(clusters, name).contiguous() for name in TYPES}
    write_whole(run_dir, {CLUSTERS_FILE: save(tensors, metadata={ABOUT: about})})


def read_clusters(path: Path, base: BaseFingerprint, seed: int, count: int) -> PromptClusters:
    """What `write_clusters` wrote for this run.

    Args:
        path: of the file.
        base, seed: of the run, as it was written with.
        count: K.

    Raises:
        CheckpointError: damaged, of another version, base, seed or number of clusters.
    """
    tensors = stored_tensors(path)
    about = _about(path)
    if (found := about.get("format_version")) != FORMAT_VERSION:
        raise READER.refusal(path, f"format_version is {quoted(found)}; this lmoe reads {FORMAT_VERSION}")
    if problem := _problem(tensors):
        raise READER.refusal(path, problem)
    stored = _base(path, about)
    if not stored.same_base(base):
        raise READER.refusal(path, f"fitted on another base, fingerprint {stored.digest}; this run has {base.digest}")
    if about.get("seed") != seed:
        raise READER.refusal(path, f"fitted with seed {quoted(about.get('seed'))}; this run has {seed}")
    if len(tensors["centroids"]) != count:
        raise READER.refusal(path, f"holds {len(tensors['centroids'])} clusters; this run has {count}")
    return PromptClusters(**tensors)


def _about(path: Path) -> dict[str, Any]:
    about = READER.parsed(stored_metadata(path).get(ABOUT, "null"), path, "its metadata cannot be read: ")
    if not isinstance(about, dict):
        raise READER.refusal(path, f"has no {ABOUT} in its metadata, so it holds no clusters of prompts")
    return about


def _base(path: Path, about: dict[str, Any]) -> BaseFingerprint:
    base = about.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("digest"), str):
        raise READER.refusal(path, "does not say which base its clusters were fitted on")
    rounded = {kind: value if isinstance(value := base.get(kind), str) else None for kind in KINDS}
    return BaseFingerprint(digest=base["digest"], **rounded)


def _problem(tensors: dict[str, Tensor]) -> str | None:
    """What is wrong with the tensors of a file, if anything."""
    if {name: tensor.dtype for name, tensor in tensors.items()} != TYPES:
        return f"must hold {', '.join(TYPES)}, holds {', '.join(sorted(tensors)) or 'nothing'} or other types"
    width, prompts = tensors["mean"].numel(), tensors["digests"].numel()
    by_prompt = dict.fromkeys(("digests", "clusters", "distances"), (prompts,))
    clusters = tensors["centroids"].shape[:1]
    shapes: dict[str, tuple[int, ...]] = {
        "centroids": (*clusters, width),
        "mean": (width,),
        "std": (width,),
        **by_prompt,
    }
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape or not tensors[name].numel():
            return f"{name} has the shape {tuple(tensors[name].shape)}, which does not fit the other tensors"
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()) or not bool((tensors["std"] > 0).all()):
        return "holds NaN, infinity or a std that is not above 0"
    if not bool(((tensors["clusters"] >= 0) & (tensors["clusters"] < len(tensors["centroids"]))).all()):
        return "names clusters that it has no centroid of"
    return None
