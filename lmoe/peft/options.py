"""Which options of an adapter_config.json leave a plain LoRA plain, and why the others are refused."""

import re
from collections.abc import Mapping
from typing import Any

from lmoe.errors import CheckpointError
from lmoe.files.wording import first_line, quoted
from lmoe.injection.site_plans import lora_scaling

HARMLESS = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
        *("bias", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
        *("alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("runtime_config", "qalora_group_size", "velora_config", "ensure_weight_tying"),
    )
)
"""They say where the tensors came from, or where they go, which the tensors' names say too."""
REFUSED = {
    "use_dora": "DoRA rescales the frozen weight's rows by a learnt magnitude, which does not add up over experts; "
    "merge it into a base of its own with PEFT's merge_and_unload, or train without use_dora",
    "modules_to_save": "it brings whole modules of its own, which cannot be blended; train without modules_to_save",
    "target_parameters": "it adapts fused experts, and blending takes Linears: `lmoe.load` runs what "
    "lmoe trained with injection=native_moe_expert_lora, PEFT runs its own",
    "trainable_token_indices": "it changes rows of the embedding; train without it",
    "layer_replication": "it repeats layers, so that its module paths are of another model",
    "lora_bias": "its branches have biases; train with lora_bias=false",
    "alora_invocation_tokens": "activated LoRA is off before its invocation tokens, and a blend is on for all tokens",
    "use_qalora": "QA-LoRA averages groups of inputs before lora_A",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA has singular values between lora_A and lora_B",
    "monteclora_config": "MonteCLoRA has sampled factors",
    "arrow_config": "it is a router over other adapters; give these, with router=arrow",
    "megatron_config": "it is for Megatron's parallel Linears",
}
PLAIN_STARTS = (True, None, "gaussian", "eva", "orthogonal", "mica")
"""Starts that leave the frozen weight as it is; False (a random lora_B) does too."""
MAX_PATTERN = 512
QUANTIFIED_GROUP = re.compile(r"\)[*+?{]")
QUANTIFIER, CHOICES = re.compile(r"(?<!\\)[*+{]|(?<![\\(])\?"), 8
"""One that repeats, which a pattern may have two of; and so many choices between two ways that may both match."""
PLAIN = r"(?:\w|\\\.)+"
LIST = re.compile(rf"\((?:\?:)?({PLAIN}(?:\|{PLAIN})+)\)")
r"""Alternatives that are plain names or numbers, as in layers\.(0|1|2)\. for some layers."""
MAX_REPEATING = 16
"""Patterns that repeat something."""


def refuse_options(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter with options that experts do not have.

    Args:
        config: an adapter_config.json.
        where: its path, for the message.

    Raises:
        CheckpointError: the adapter is more than a plain LoRA on Linears; says which option and what to do.
    """
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {quoted(config.get('peft_type'))}; only LORA can be blended")
    for key, reason in REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{where}: {key} is set: {reason}")
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{where}: bias is {quoted(config['bias'])}: it brings biases of the base; train with bias=none"
        )
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in PLAIN_STARTS:
        raise CheckpointError(
            f"{where}: init_lora_weights is {quoted(start)}, which changes more than the branches; convert it with "
            "PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    for key, value in config.items():
        if key not in HARMLESS and key not in REFUSED and value not in (None, False, [], {}, ""):
            raise CheckpointError(
                f"{where}: {quoted(key)} is an option that this version does not know, so it may change what the "
                "adapter computes; remove it if it does not"
            )


class Scalings:
    """Rank and scaling of each module as PEFT finds them: the first pattern that matches the end of its path.

    Args:
        config: an adapter_config.json that was not refused.
        where: its path, for messages.

    Raises:
        CheckpointError: numbers or patterns that cannot be.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where, self.rslora = where, bool(config.get("use_rslora"))
        self.rank = _number(config.get("r", 8), "r", where)
        self.alpha = _number(config.get("lora_alpha", 8), "lora_alpha", where)
        self.ranks = _patterns(config.get("rank_pattern"), "rank_pattern", where)
        self.alphas = _patterns(config.get("alpha_pattern"), "alpha_pattern", where)

    def of(self, path: str, rank: int) -> float:
        """Scaling of the branch at a path.

        Raises:
            CheckpointError: the tensors have another rank than the config.
        """
        wanted = _first(self.ranks, path, self.rank)
        if wanted != rank:
            raise CheckpointError(f"{self.where}: {path} should have rank {wanted:g}, and its tensors have {rank}")
        return lora_scaling(_first(self.alphas, path, self.alpha), rank, self.rslora)


def _first(patterns: list[tuple[re.Pattern[str], float]], path: str, usual: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(path)), usual)


def _patterns(given: object, key: str, where: str) -> list[tuple[re.Pattern[str], float]]:
    """NOTE a regular expression from a stranger can run for ever: what repeats does that, and many alternatives."""
    if given is not None and not isinstance(given, dict):
        raise CheckpointError(f"{where}: {key} must map patterns to numbers, is {type(given).__name__}")
    found, repeating = [], 0
    for pattern, value in (given or {}).items():
        count = len(QUANTIFIER.findall(pattern))
        repeating += count > 0
        repeats = count > 2 or repeating > MAX_REPEATING or QUANTIFIED_GROUP.search(pattern)
        if len(pattern) > MAX_PATTERN or repeats or _ways(pattern) > 2**CHOICES:
            raise CheckpointError(f"{where}: {key}: {quoted(pattern)} is no simple pattern; name modules by their path")
        try:
            compiled = re.compile(rf"(?:.*\.)?(?:{pattern})$")
        except re.error as error:
            raise CheckpointError(f"{where}: {key}: {quoted(pattern)} is no pattern: {first_line(error)}") from None
        found.append((compiled, _number(value, f"{key}[{quoted(pattern)}]", where)))
    return found


def _ways(pattern: str) -> int:
    """Number of ways of matching one text, at most, that have to be tried for a pattern's alternatives.

    In a list of plain names only those that begin with one another can match at one place: of any number of layers two
    or three, where every other alternative doubles the ways.
    """
    ways = 2 ** LIST.sub("", f"({pattern})").count("|")
    for found in LIST.finditer(f"({pattern})"):
        names = found[1].split("|")
        ways *= max(sum(name.startswith(other) for other in names) for name in names)
    return ways


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
        raise CheckpointError(f"{where}: {key} must be a number up to 1e9, is {quoted(value)}")
    return float(value)
