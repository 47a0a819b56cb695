"""Part 1: every module imports, and the names that other versions lack are there."""

import importlib
import pkgutil

import torch
from transformers import PreTrainedModel

import lmoe
from benchmarks.gpu_parts.part import Findings, Place

OPTIONAL = (
    *("lm_eval", "peft", "bitsandbytes", "accelerate", "ray", "submitit", "joblib", "hydra_plugins", "triton"),
    *("prometheus_client", "pydantic", "python_multipart", "starlette", "uvicorn", "optuna", "gguf"),
)
"""Packages of the extras, which need not be installed."""


def imports(place: Place) -> Findings:
    """All modules of lmoe; torch's grouped matmul; Transformers' switch for activation checkpointing."""
    found, skipped, count = Findings(), [], 0
    for module in pkgutil.walk_packages(lmoe.__path__, "lmoe."):
        try:
            importlib.import_module(module.name)
            count += 1
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in OPTIONAL:
                skipped.append(f"{module.name} (needs {error.name})")
            else:
                found.problems.append(f"{module.name}: {error}")
        except Exception as error:  # whatever a module does when it is imported
            found.problems.append(f"{module.name}: {type(error).__name__}: {error}")
    switches = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    there = [name for name in switches if hasattr(PreTrainedModel, name)]
    found.expect(hasattr(torch.nn.functional, "grouped_mm"), "torch.nn.functional.grouped_mm is missing")
    found.expect(bool(there), f"PreTrainedModel has none of {', '.join(switches)}")
    found.figures = {"modules": count, "left out": skipped, "checkpointing by": there}
    return found
