"""The words that settings choose from; what a config, a rule, a tensor function and a module all name alike."""

from enum import StrEnum

L1_LEAST, L1_MOST = 1e-12, 1e4
"""Bounds of relu's L1 weight, within which it can always find its way back."""


class TaskName(StrEnum):
    """What is learnt."""

    sft = "sft"
    dpo = "dpo"
    orpo = "orpo"
    simpo = "simpo"
    kto = "kto"
    reward = "reward"


class RowKind(StrEnum):
    """What an objective learns from."""

    answers = "answers"
    pairs = "pairs"
    labelled = "labelled"


class PreferenceLoss(StrEnum):
    """What is made of the margin between a chosen and a rejected answer."""

    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"


class Reference(StrEnum):
    """What a preference objective measures its policy against."""

    base = "base"
    start = "start"


class TrainOn(StrEnum):
    """Which turns of a conversation are learnt."""

    assistant = "assistant"
    last = "last"
    all = "all"


class DryRun(StrEnum):
    """How much of a run is tried."""

    none = "none"
    config = "config"
    estimate = "estimate"
    preflight = "preflight"


class InjectionStrategy(StrEnum):
    """How experts are put into the backbone."""

    dense_lora = "dense_lora"
    mixture_lora = "mixture_lora"
    moe_expert_lora = "moe_expert_lora"
    native_moe_expert_lora = "native_moe_expert_lora"


class InitLora(StrEnum):
    """How experts start."""

    random = "random"
    svd = "svd"


class RouterKind(StrEnum):
    """How experts are chosen and weighted."""

    top_k = "top_k"
    soft = "soft"
    top_p = "top_p"
    sigmoid = "sigmoid"
    relu = "relu"
    noisy_top_k = "noisy_top_k"
    sequence = "sequence"
    uniform = "uniform"
    random = "random"
    oracle = "oracle"
    prompt_hash = "prompt_hash"


class BlendRouter(StrEnum):
    """Who decides the weights of a blend."""

    weighted = "weighted"
    static = "static"
    arrow = "arrow"
    encoder = "encoder"


class RouterScope(StrEnum):
    """What one router decides for."""

    linear = "linear"
    block = "block"
    model = "model"


class Decide(StrEnum):
    """Which prompts of a conversation a router of the whole model decides for."""

    first = "first"
    turn = "turn"


class RouterTarget(StrEnum):
    """What routers are taught to tell apart."""

    none = "none"
    domain = "domain"
    cluster = "cluster"
    auto = "auto"


class RouteBy(StrEnum):
    """Whose decision the experts train on."""

    router = "router"
    target = "target"


class RouterDtype(StrEnum):
    """Type of the router's arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class MixtureScale(StrEnum):
    """What the weights of the chosen experts add up to."""

    sum_to_one = "sum_to_one"
    unit = "unit"
    raw = "raw"


class Mixing(StrEnum):
    """What is averaged."""

    outputs = "outputs"
    factors = "factors"


class Backend(StrEnum):
    """How the experts are computed."""

    auto = "auto"
    stacked = "stacked"
    grouped = "grouped"
    triton = "triton"


CHOSEN_ALONE = (Backend.grouped, Backend.triton)
"""Backends that compute the chosen experts of a mixture, and no others."""


class LoadBalanceType(StrEnum):
    """What spreads tokens over experts."""

    aux_loss = "aux_loss"
    aux_loss_free = "aux_loss_free"
    importance_cv = "importance_cv"
    none = "none"


class BalanceScope(StrEnum):
    """Over which tokens the load is counted."""

    micro_batch = "micro_batch"
    global_batch = "global_batch"


class BackbonePrecision(StrEnum):
    """Storage type of the frozen weights; adapters and routers are always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    nf4 = "nf4"


QUANTISED = (BackbonePrecision.int8, BackbonePrecision.nf4)
"""What bitsandbytes makes of the weights while it loads them."""


class Role(StrEnum):
    """The group that a parameter belongs to."""

    backbone = "backbone"
    base_ffn = "base_ffn"
    router = "router"
    lora = "lora"
    attn_lora = "attn_lora"
    head = "head"
    reward_head = "reward_head"


class PhaseMode(StrEnum):
    """How a phase's roles stand to those of the phase before."""

    replace = "replace"  # type: ignore[assignment]  # NOTE hides str.replace, which nobody needs of a mode
    add = "add"


class Curve(StrEnum):
    """Shape of a change from 0 to 1."""

    linear = "linear"
    cosine = "cosine"


class LrSchedule(StrEnum):
    """Shape of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class Accelerator(StrEnum):
    """Where the run computes."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


class Strategy(StrEnum):
    """Lightning's strategy for one or many devices."""

    auto = "auto"
    ddp = "ddp"
    fsdp2 = "fsdp2"
    device_map = "device_map"
    deepspeed = "deepspeed"


class NonFinite(StrEnum):
    """What happens where a loss or a gradient is no number."""

    stop = "stop"
    skip = "skip"


class OnBadRow(StrEnum):
    """What a row does that cannot be used."""

    error = "error"
    drop = "drop"


class KnockOut(StrEnum):
    """Which experts are silenced, one at a time, at the end of a run."""

    none = "none"
    experts = "experts"
    sites = "sites"


class Prompts(StrEnum):
    """How questions are put."""

    auto = "auto"
    chat = "chat"
    bare = "bare"


class ExportFormat(StrEnum):
    """What `lmoe export` writes."""

    peft = "peft"
    peft_experts = "peft-experts"
    per_domain = "per-domain"
    prompt_router = "prompt-router"
    merged = "merged"
    native_moe = "native-moe"
    lmoe = "lmoe"
    gguf = "gguf"
    gguf_lora = "gguf-lora"


class GgufType(StrEnum):
    """The numbers of the matrices in a GGUF file."""

    f32 = "f32"
    f16 = "f16"


class Sampler(StrEnum):
    """How the values that a study tries are drawn."""

    grid = "grid"
    tpe = "tpe"


class AtEdge(StrEnum):
    """What a study does where the best of an arm's values is the outermost."""

    widen = "widen"
    report = "report"


class LoggerKind(StrEnum):
    """metrics.csv is always written; wandb adds a W&B run."""

    wandb = "wandb"
    csv = "csv"
    none = "none"


class WandbMode(StrEnum):
    """auto: online if an API key is stored on this machine, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"
