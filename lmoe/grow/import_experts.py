"""Fill the experts of a freshly injected mixture with what was trained elsewhere.

Shapes: D in, O out, R rank.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lmoe.backbones.placement import refuse_offloaded
from lmoe.errors import CheckpointError, ConfigError
from lmoe.grow.grow import take_over
from lmoe.injection.plan import SiteKind, SitePlan
from lmoe.injection.record import injected, new_names, record_expert_names, sites
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear
from lmoe.ops.lora import rescaled_lora_B
from lmoe.peft.reader import Branch, ExpertFile, read_expert
from lmoe.rules.experts_from import experts_from_problems, named_adapters, source_run, without_source


def import_experts(model: nn.Module, experts_from: Mapping[str, str | Path] | str | Path) -> None:
    """Give a model that has just been injected experts that exist, as `injection.experts_from` does.

    Adapters by name: expert i gets the i-th adapter's factors at every Linear that it adapts, with zeros in lora_B up
    to the rank of the site and its own scaling folded into lora_B, and adds nothing elsewhere; further experts and the
    routers stay as they were injected. A run: see `take_over`.

    Args:
        model: injected, not trained; with mixture_lora, or for a run with the strategy of that.
        experts_from: {name: PEFT adapter, or dense_lora run of lmoe}, or one run that trains on or grows.

    Raises:
        ConfigError: names or counts that cannot be.
        CheckpointError: no adapter there, another base, a branch without a place, or a rank that is too large.
        BackboneError: weights that accelerate has offloaded.
    """
    record = injected(model)
    refuse_offloaded(model, "importing experts")
    given = dict(experts_from) if isinstance(experts_from, Mapping) else str(experts_from)
    given = {name: str(place) for name, place in given.items()} if isinstance(given, dict) else given
    section = without_source(record.injection)
    section.experts_from = given
    section.lora_B_std = None  # what was drawn for an expert that comes from elsewhere is overwritten
    if problems := experts_from_problems(section):
        raise ConfigError(problems)
    if (run := source_run(section)) is not None:
        take_over(model, run)
        return
    adapters = named_adapters(section)
    plans = {site.path: site for site in record.plan.sites}
    files = {name: read_expert(place, model, base=record.base) for name, place in adapters.items()}
    _check_places(files, plans)  # a refusal leaves the model as it was
    for path, site in sites(model):
        if isinstance(site, MixtureLoRALinear):
            for expert, file in enumerate(files.values()):
                _fill(site, expert, file.branches.get(path))
    record_expert_names(model, [*adapters, *new_names(list(adapters), max(record.plan.routers.values()))])


def _check_places(files: dict[str, ExpertFile], plans: dict[str, SitePlan]) -> None:
    """Refuse adapters with branches that no expert of the mixture can take.

    Raises:
        CheckpointError: a branch where no mixture is, or of a larger rank than its site.
    """
    for name, file in files.items():
        where = f"injection.experts_from.{name} ({file.header.folder})"
        for path, branch in file.branches.items():
            site = plans.get(path)
            if site is None or site.kind is not SiteKind.mixture:
                why = "no experts go" if site is None else "a single LoRA is, beside the experts"
                raise CheckpointError(f"{where} adapts {path}, where {why}; {_cure(files, plans)}")
            if len(branch.lora_A) > site.lora_r:
                largest = max(len(b.lora_A) for f in files.values() for b in f.branches.values())
                raise CheckpointError(
                    f"{where} has rank {len(branch.lora_A)} at {path}, and experts have {site.lora_r} there; set "
                    f"injection.lora_r to at least {largest}"
                )


def _cure(files: dict[str, ExpertFile], plans: dict[str, SitePlan]) -> str:
    """Settings with which every branch of every adapter has its place."""
    mixed = [path for path, site in plans.items() if site.kind is SiteKind.mixture]
    adapted = list(dict.fromkeys(path for file in files.values() for path in file.branches))
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in [*mixed, *adapted])
    settings = [f"injection.target_keywords=[{','.join(leaves)}]"]
    single = {path.rpartition(".")[2] for path, site in plans.items() if site.kind is SiteKind.single}
    if rest := sorted(single - leaves.keys()):
        settings.append(f"injection.attn_lora.keywords=[{','.join(rest)}]")
    elif single:
        settings.append("injection.attn_lora.enabled=false")
    return f"set {' '.join(settings)} (and no start_layer, num_layers or stride that leaves the layer out)"


def _fill(site: MixtureLoRALinear, expert: int, branch: Branch | None) -> None:
    """NOTE lora_A stays random beyond the branch's rank: zeros in both factors would never get a gradient."""
    with torch.no_grad():
        site.lora_B[expert].zero_()
        if branch is not None:
            rank = len(branch.lora_A)
            site.lora_A[expert, :rank] = branch.lora_A.to(site.lora_A)
            lora_B = rescaled_lora_B(branch.lora_B, branch.scaling, site.settings.scaling)
            site.lora_B[expert, :, :rank] = lora_B.to(site.lora_B)
