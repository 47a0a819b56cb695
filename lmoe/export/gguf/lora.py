"""A LoRA adapter as a GGUF file, which llama.cpp applies beside the GGUF file of its base.

There a weight gains scale * alpha / R * B A, with one alpha for the whole file and R the rank of that weight.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from lmoe.adapter.load import as_argument
from lmoe.backbones.load import bare_model
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import CheckpointError, keys_renamed
from lmoe.export.gguf.architectures import HEAD, Architecture, architecture_of, weight_name
from lmoe.export.gguf.file import GgufTensor, gguf_output, write_gguf_file
from lmoe.export.gguf.tensors import heads_of, rotated
from lmoe.peft.expert_file import Branch, ExpertHeader, check_fits
from lmoe.peft.reader import read_branches, read_header
from lmoe.vocabulary import GgufType

if TYPE_CHECKING:
    from gguf import GGUFWriter  # type: ignore[import-not-found] - an extra


@dataclass(slots=True, frozen=True, kw_only=True)
class GgufLora:
    """What was written of an adapter.

    Args:
        file: where.
        ranks: by the name of the weight in llama.cpp.
    """

    file: Path
    ranks: dict[str, int]


def write_gguf_lora(
    adapter: str | Path, output: str | Path, base_model: str | None = None, kind: GgufType = GgufType.f32
) -> GgufLora:
    """Write one LoRA adapter as a GGUF file; of its base only the config is read.

    Args:
        adapter: a PEFT adapter (directory or hub name), or an lmoe adapter or run of dense_lora.
        output: a file that does not exist, whose name ends in .gguf.
        base_model: hub name or directory of the backbone; None: the one that the adapter names.
        kind: type of all numbers.

    Raises:
        CheckpointError: no such adapter, one that does more than LoRA on Linears, or that llama.cpp has no place for;
            something in the way, too little space, or gguf is not installed.
        BackboneError: the base cannot be found, or its class is not one that llama.cpp computes alike.
    """
    file = gguf_output(output)
    header = read_header(adapter)
    bare = _bare(header, base_model)
    architecture = architecture_of(type(bare).__name__, bare.config, bare.name_or_path or type(bare).__name__)
    names = _names(header, bare, architecture)
    alpha, branches = _with_one_alpha(read_branches(header), header.folder)
    tensors = []
    for path, branch in branches.items():
        heads = heads_of(architecture, path, bare.config)
        up = branch.lora_B if heads is None else rotated(branch.lora_B, heads)
        for end, tensor in (("lora_a", branch.lora_A), ("lora_b", up)):
            name = f"{names[path]}.weight.{end}"
            tensors.append(GgufTensor(name=name, shape=tuple(tensor.shape), kind=kind, read=lambda own=tensor: own))

    def describe(writer: "GGUFWriter") -> None:
        from gguf import GGUFType, Keys  # type: ignore[import-not-found]

        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(file.stem)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)

    write_gguf_file(file, architecture.name, describe, tensors)
    return GgufLora(file=file, ranks={names[path]: branch.lora_A.shape[0] for path, branch in branches.items()})


def _bare(header: ExpertHeader, base_model: str | None) -> PreTrainedModel:
    """The adapter's base without its numbers, into which it fits."""
    if header.base_weights:
        raise CheckpointError(
            f"{header.folder}: holds weights of the base too ({', '.join(header.base_weights)}), which no LoRA file of "
            "llama.cpp can; merge it into the base, or, where they are unchanged, save it without them: "
            "save_pretrained(…, save_embedding_layers=False)"
        )
    name = base_model or header.base_model
    if name is None:
        raise CheckpointError(f"{header.folder}: the adapter does not name its base; give `base_model`")
    with keys_renamed(as_argument(name)):
        bare = bare_model(BackboneConfig(model_name=name))
    check_fits(replace(header, bases=()), bare)  # without its numbers it has no fingerprint
    return bare


def _names(header: ExpertHeader, bare: PreTrainedModel, architecture: Architecture) -> dict[str, str]:
    """What llama.cpp calls the weight of each module that the adapter changes."""
    found = {path: weight_name(architecture, path) for path in header.branches}
    lost = [path for path, name in found.items() if name is None]
    if HEAD in found and bare.config.tie_word_embeddings:
        lost.append(HEAD)
    if lost:
        raise CheckpointError(
            f"{header.folder}: {', '.join(lost[:3])} cannot be changed in llama.cpp, whose {architecture.name} has no "
            "weight for it alone; merge the adapter into the base, and write that as GGUF"
        )
    return {path: name for path, name in found.items() if name is not None}


def _with_one_alpha(branches: Mapping[str, Branch], where: Path) -> tuple[float, dict[str, Branch]]:
    """The commonest alpha, and the branches; those with another one have the difference in lora_B."""
    alphas = {path: branch.scaling * branch.lora_A.shape[0] for path, branch in branches.items()}
    common = Counter(alpha for alpha in alphas.values() if alpha).most_common(1)
    if not common:
        raise CheckpointError(f"{where}: every scaling is 0, so the adapter does nothing")
    alpha = common[0][0]
    scaled = {}
    for path, branch in branches.items():
        own = branch
        if alphas[path] != alpha:
            up = branch.lora_B.to(torch.float64) * (alphas[path] / alpha)
            own = Branch(branch.lora_A, up.to(torch.float32), alpha / branch.lora_A.shape[0])
        scaled[path] = own
    return alpha, scaled
