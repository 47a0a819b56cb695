"""Where metrics go beside metrics.csv."""

from dataclasses import dataclass, field

from lmoe.vocabulary import LoggerKind, WandbMode


@dataclass(slots=True, kw_only=True)
class LoggerConfig:
    """Weights & Biases, offline unless the user is logged in or asks for online."""

    kind: LoggerKind = LoggerKind.wandb
    """wandb, csv or none (csv and none: metrics.csv alone)."""
    mode: WandbMode = WandbMode.auto
    """auto, online or offline. Never a prompt."""
    project: str = "lmoe"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null: the account's default."""
    group: str | None = None
    """W&B group of the run, e.g. for a multirun."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    job_type: str | None = None
    """W&B job type, by which runs of a group are told apart; null: train or pretrain."""
    notes: str | None = None
    """What the run is about, as W&B shows it beside its name; null: nothing."""
    samples: bool = False
    """At each validation upload the text of a few validation rows with the expert of each token."""
    artifact: bool = False
    """At the end upload the adapter as an artifact, with the digests of its base and its rows as what it is made of."""
