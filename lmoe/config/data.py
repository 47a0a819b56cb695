"""Rows, and how they become batches."""

from dataclasses import dataclass, field
from typing import Any

from lmoe.vocabulary import OnBadRow, TrainOn

BUNDLED, BUNDLED_PREFERENCE = "bundled", "bundled_preference"
"""What data.path calls the rows that ship with lmoe: instructions, and pairs of answers."""
BUNDLED_FOLDERS = {BUNDLED: "sft", BUNDLED_PREFERENCE: "preference"}
"""Their folders in data/, each with train/, val/ and judge/."""
JUDGE = "judge"
"""What an evaluation calls the rows that a run's config keeps for judging."""


@dataclass(slots=True, kw_only=True)
class SourceConfig:
    """One of several sources of training rows."""

    path: str = ""
    """As data.path."""
    domain: str | None = None
    """Domain of its rows that name none; null: the name of the source."""
    weight: float | None = None
    """Its part of the training rows, against the weights of the other sources (0 leaves it out); null, in all sources:
    each row comes once."""
    split: str = "train"
    """Split of a data set, in the words of datasets: train, or train[:10%]."""
    config: str | None = None
    """Configuration of a data set of the hub; null: its only one."""
    revision: str | None = None
    """Branch, tag or commit of a data set of the hub; null: the newest."""
    columns: dict[str, str] = field(default_factory=dict)
    """As data.columns."""


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Training and validation rows."""

    path: str = "bundled"
    """File, folder, data set of the hub, or what ships with lmoe: bundled (instructions in eight domains),
    bundled_preference (pairs of answers)."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources by name, in place of data.path."""
    columns: dict[str, str] = field(default_factory=dict)
    """What the rows call our keys, such as {prompt: question, response: answer}."""
    domains: list[str] | None = None
    """Domains whose rows are trained and validated on; null: all."""
    permute_domains: bool = False
    """A control: deal the domains anew among the training rows, and among the validation rows, so that they say nothing
    of a row; every run deals the same rows alike."""
    val_path: str | None = None
    """Validation rows, as data.path; null: a seeded share of the training rows (what
    ships with lmoe: its own validation rows)."""
    val_fraction: float = 0.05
    """Share of the rows kept for validation where there is no val_path, above 0 and below 1."""
    split_seed: int | None = None
    """Seed of that share, so that runs of several seeds can keep the same rows; null: seed."""
    judge_path: str | None = None
    """Rows for judging runs, as data.path: nothing but `lmoe study`, `lmoe compare` and an evaluation that is asked for
    them (data=judge) reads them; null: see judge_fraction (what ships with lmoe: its own judging rows)."""
    judge_fraction: float = 0.0
    """Share of the rows kept for judging where there is no judge_path, split off like validation rows and before them;
    0: none."""
    val_rows_per_domain: int = 0
    """Validation rows used of each domain, the first ones; 0: all."""
    temperature: float | None = None
    """Draw a domain of n rows in proportion to n^(1/temperature): above 1 evens them out; null: as they are."""
    on_bad_row: OnBadRow = OnBadRow.error
    """Rows that cannot be used (malformed, or refused by the chat template). error: end, naming the first five; drop:
    leave them out and count them."""
    max_length: int = 512
    """Longest row in tokens; what is longer is cut at the end."""
    batch_size: int = 16
    """Rows (with packing: packed sequences of max_length tokens) in one micro-batch."""
    packing: bool | None = None
    """Put several training rows into one sequence of max_length tokens, attention kept apart by position ids; null:
    where the backbone is known to keep them apart."""
    num_workers: int = 0
    """Processes that load batches; 0: the main process."""
    num_proc: int | None = None
    """Processes that tokenise rows which are not in the cache; null: torch's number of threads, for large sources."""
    streaming: bool = False
    """Read training rows while training, for sets that do not fit on the disk or take long to tokenise: a pass goes
    through the files in a seeded order, and through blocks of data.shuffle_buffer rows. Needs data.val_path."""
    shuffle_buffer: int = 10_000
    """Rows of a block of a stream, which are shuffled, and packed, among themselves."""
    chat_template: str | None = None
    """File with a Jinja chat template, which is saved with the adapter; null: the tokenizer's own."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}; they are saved with the adapter's template."""
    template_date: str | None = None
    """Day (YYYY-MM-DD) that a chat template reads which asks for the date; null: the day the run begins."""
    prompt_prefix: str | None = None
    """Text in front of the first message of the user in each conversation, such as "[{domain}] ": {domain} stands for
    the row's domain, all else is kept as it is; null: none."""
    clusters: int | None = None
    """With moe.router_target=cluster: into how many clusters the prompts of the training rows are put, by k-means on
    hidden states of the base; null: injection.num_experts."""
    train_on: TrainOn = TrainOn.assistant
    """Turns that are learnt: all of the assistant's, its last one, or all text; turns with weight 0 never are."""
    cache_dir: str | None = None
    """Folder of tokenised rows; null: $XDG_CACHE_HOME/lmoe or ~/.cache/lmoe."""

    @property
    def is_bundled(self) -> bool:
        """Whether the training rows are those that ship with lmoe."""
        return self.path in BUNDLED_FOLDERS and not self.sources

    @property
    def splits_val(self) -> bool:
        """Whether validation rows are split off the training rows: they have no place of their own."""
        return not self.val_path and not self.is_bundled

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch, at most; so many of prompts are read in one forward, too."""
        return self.batch_size * self.max_length

    def columns_of(self, path: str) -> dict[str, str]:
        """What the rows at `path` call our keys: data.columns. Rows that ship with lmoe have our keys; bundled pairs of
        answers may be read by other ones where they are the training rows."""
        if path not in BUNDLED_FOLDERS or (path == BUNDLED_PREFERENCE == self.path and not self.sources):
            return self.columns
        return {}
