"""The card of what is pushed: README.md with the front matter that the hub reads."""

from collections.abc import Mapping
from typing import Any

from lmoe import __version__
from lmoe.files.resources import BASES
from lmoe.hub.contents import Contents, Kind
from lmoe.hub.description import DataSource, ModelDescription
from lmoe.report.markdown import front_matter, plain, table
from lmoe.report.summary import FINISHED, RunSummary
from lmoe.run.verb_call import VerbCall, Wording

UNKNOWN = "unknown"
HOME = "lmoe"
ALT = {
    "load_by_domain": "Load of each expert by domain",
    "load_by_site": "Load of each expert by site",
    "coactivation": "Experts that are chosen together",
    "knock_out": "What silencing an expert does to the loss of each domain",
    "loss_curves": "Training and validation loss",
}
"""What a picture shows, by its name."""

SCORE = (
    'turns = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]',
    'text = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)',
    'score = lmoe.reward(model, text["input_ids"], text["attention_mask"])  # the higher, the more it is preferred',
)
"""How a reward model is asked, in Python."""


def card_text(name: str, description: ModelDescription, revision: str | None = None, *, wording: Wording = str) -> str:
    """Returns README.md, in Markdown.

    Args:
        name: user/name on the hub.
        description: what is known.
        revision: branch that it is pushed to; None: main.
        wording: how the command is said that uses it.
    """
    parts = [
        front_matter(_metadata(description)),
        [f"# {plain(name.partition('/')[2])}", "", _opening(description)],
        ["## Use", "", *_use(name, description, revision, wording)],
        ["## Licences", "", *_licences(description)],
        _data(description.data),
        _training(description),
        [] if description.summary is None else _results(description.summary, description.contents.kind),
        _pictures(description.contents),
        ["## Versions", "", _versions(description)],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _metadata(description: ModelDescription) -> Mapping[str, Any]:
    kind = description.contents.kind
    library = {Kind.adapter: HOME, Kind.peft: "peft", Kind.model: "transformers"}[kind]
    tags = [HOME] if kind is Kind.model else [HOME, "lora"]
    tags += ["mixture-of-experts"] if kind.is_lmoe and description.routes else []
    tags += ["reward-model"] if description.scores else []
    task = "text-classification" if description.scores else "text-generation"
    metadata: dict[str, Any] = {"library_name": library, "pipeline_tag": task, "tags": tags}
    if description.base_on_hub:
        relation = "finetune" if kind is Kind.model else "adapter"
        metadata |= {"base_model": description.base, "base_model_relation": relation}
    if datasets := [source.name for source in description.data if source.on_hub]:
        metadata["datasets"] = datasets
    return metadata


def _opening(description: ModelDescription) -> str:
    what = {
        Kind.adapter: "An adapter of lmoe: LoRA experts and their routers, beside a frozen base",
        Kind.peft: "A PEFT adapter that was exported by lmoe",
        Kind.model: "A language model that was exported by lmoe, to be loaded with transformers as it is",
    }[description.contents.kind]
    if description.scores:
        what += "; and a head that scores answers (a reward model)"
    return f"{what}. Base: {_base(description)}."


def _base(description: ModelDescription) -> str:
    if description.base is None:
        return UNKNOWN
    if description.base_on_hub:
        return f"[{plain(description.base)}](https://huggingface.co/{description.base})"
    where = "which ships with lmoe" if description.base in BASES else "a folder of whoever trained it"
    return f"{plain(description.base)} ({where})"


def _use(name: str, description: ModelDescription, revision: str | None, wording: Wording) -> list[str]:
    pinned = "" if revision is None else f', revision="{revision}"'
    findable = description.base_on_hub or description.base in BASES
    if description.contents.kind is Kind.adapter:
        base = "" if findable else ', base_model="DIRECTORY_OR_HUB_NAME_OF_THE_BASE"'
        load = ("```python", "import lmoe", "", f'model, tokenizer = lmoe.load("{name}"{base}{pinned})')
        if description.scores:
            return [*load, *SCORE, "```"]
        given = {"checkpoint": name, "revision": revision, "base_model": None if findable else "BASE", "prompt": "…"}
        call = VerbCall(verb="generate", settings={key: value for key, value in given.items() if value is not None})
        return [*load, "```", "", "```", wording(call), "```"]
    if description.contents.kind is Kind.peft:
        place = repr(description.base) if findable and description.base not in BASES else '"BASE"'
        place = place.replace("'", '"')
        return [
            *("```python", "from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""),
            f"base = AutoModelForCausalLM.from_pretrained({place})",
            *(f'model = PeftModel.from_pretrained(base, "{name}"{pinned})', "```"),
        ]
    return [
        *("```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{pinned})',
        *(f'tokenizer = AutoTokenizer.from_pretrained("{name}"{pinned})', "```"),
    ]


def _licences(description: ModelDescription) -> list[str]:
    licence = UNKNOWN if description.base_licence is None else plain(description.base_licence)
    return [
        f"* Base: {licence}.",
        "* Rows: see below." if description.data else f"* Rows that it has learnt: {UNKNOWN}.",
        "* These weights: for whoever shares them to say, within the licences of the base and the rows.",
    ]


def _data(sources: tuple[DataSource, ...]) -> list[str]:
    if not sources:
        return []
    kinds = {True: "bundled with lmoe", False: "own file or folder"}
    rows = [
        [
            plain(source.name),
            "data set of the hub" if source.on_hub else kinds[source.bundled],
            UNKNOWN if source.licence is None else plain(source.licence),
        ]
        for source in sources
    ]
    lines = ["## Rows that it has learnt, or was validated on", "", *table(["rows", "from", "licence"], rows, left=3)]
    if any(source.bundled for source in sources):
        lines += ["", "Sources and attribution of bundled rows are in `data/README.md` of lmoe."]
    return lines


def _training(description: ModelDescription) -> list[str]:
    rows = [[name, plain(value)] for name, value in description.settings.items()]
    if description.expert_names:
        rows.append(["experts", ", ".join(map(plain, description.expert_names))])
    rows += [
        [f"phase {plain(name)}", f"from step {start + 1}, trains {', '.join(roles)}{_learns(description, name)}"]
        for name, start, roles in description.phases
    ]
    if (summary := description.summary) is not None:
        steps = summary.max_steps if summary.steps is None else summary.steps
        rows.append(["steps", f"{steps:,}" + ("" if summary.ended == FINISHED else f" ({plain(summary.ended)})")])
        rows.append(["trainable parameters", f"{summary.trainable_parameters:,}"])
    return ["## Training", "", *table(["setting", "value"], rows, left=2)] if rows else []


def _learns(description: ModelDescription, phase: str) -> str:
    """The objective of a phase, where some phase learns another one than sft."""
    objective = description.objectives.get(phase)
    return "" if objective is None else f"; learns by {plain(objective)}"


def _results(summary: RunSummary, kind: Kind) -> list[str]:
    rows = [
        [plain(domain), _loss(summary.before.get(domain)), _loss(summary.after.get(domain))]
        for domain in summary.domains
    ]
    rows.append(["mean", _loss(summary.before_mean), _loss(summary.after_mean)])
    header = ["domain", "adapters off", "after"]
    of_phase = f", of phase {plain(summary.last_phase or '')} on its rows" if summary.measures_differ else ""
    of_run = "" if kind.is_lmoe else ": that of the whole run, which this was exported from"
    measured = f"{summary.loss_title} ({summary.loss_measure}){of_phase}{of_run}."
    return ["## Results", "", measured, "", *table(header, rows)]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _pictures(contents: Contents) -> list[str]:
    if not contents.pictures:
        return []
    lines = ["## What the routers did"]
    for path in contents.pictures:
        lines += ["", f"![{ALT[path.rpartition('/')[2].removesuffix('.png')]}]({path})"]
    return lines


def _versions(description: ModelDescription) -> str:
    trained = ", ".join(f"{name} {version}" for name, version in description.versions.items())
    commit = "" if description.revision is None else f", commit {description.revision} of lmoe"
    made = f"Trained with {trained}{commit}. " if trained else ""
    return f"{made}This card was written by version {__version__} of lmoe."
