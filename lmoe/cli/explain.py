"""`lmoe explain`: what each expert does to a text, as a page, as JSON and as a table."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lmoe.cli.errors import exit_code_of
from lmoe.cli.speak import SpeakerFlags, open_speaker
from lmoe.config.named_values import named_places, named_weights
from lmoe.config.problems import raise_problems, without_effect
from lmoe.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from lmoe.explain.explain import Explainer
    from lmoe.explain.explanation import Explanation, TextTokens
    from lmoe.generate.speaker import Speaker

DECIDING = ("encoder", "arrow")
"""Routers of a blend that need no weights of the user."""
NEW_TOKENS = 32
"""Of the answer to a prompt, where nothing is said."""


@dataclass(slots=True, frozen=True, kw_only=True)
class ExplainFlags:
    """What is explained, as the flags say it.

    Args:
        prompt, rows: the text: what a user says, or rows with their own answers.
        max_new_tokens: longest answer to a prompt.
        limit: rows that are explained.
        max_tokens: longest text.
        profile_rows: validation rows of each domain that experts are shown by; 0: none.
        compare, compare_weights: another run, or other weights of the blend, on the same tokens.
        output: page to write.
    """

    prompt: str | None
    rows: str | None
    max_new_tokens: int | None
    limit: int | None
    max_tokens: int
    profile_rows: int | None
    compare: str | None
    compare_weights: str | None
    output: str


def run(flags: SpeakerFlags, asked: ExplainFlags) -> int:
    """Returns the exit code."""

    def action() -> None:
        raise_problems(problems(flags, asked) or flags.problems())
        from rich.console import Console

        from lmoe.explain.page import explanation_page, json_place
        from lmoe.explain.table import print_explanation
        from lmoe.files.run_folder import path_from_here
        from lmoe.report.files import write_bytes
        from lmoe.report.html import page_place
        from lmoe.report.say import say
        from lmoe.run.announce import quiet_libraries

        quiet_libraries()
        console, progress_console = Console(), Console(stderr=True)
        page = page_place(asked.output)
        file = json_place(page)  # before a model is loaded
        found = _explained(flags, asked, progress_console)
        content, as_text = explanation_page(found, file.name)
        write_bytes(page, content.encode("utf-8"))
        write_bytes(file, as_text.encode("utf-8"))
        print_explanation(console, found)
        say(console, f"In {path_from_here(page.parent)}: {page.name} (open it in a browser), {file.name}")

    return exit_code_of(action)


def problems(flags: SpeakerFlags, asked: ExplainFlags) -> list[str]:
    """Flags that cannot stand together."""
    found = []
    if asked.prompt is not None and asked.rows is not None:
        found.append("give --prompt or --rows, not both")
    if asked.prompt is None and asked.rows is None and flags.domain is None:
        found.append("give --prompt TEXT, --rows FILE, or --domain NAME (validation rows of the run)")
    if asked.prompt is None and asked.max_new_tokens is not None:
        found.append(without_effect("--max-new-tokens", "without --prompt: rows have their own answers"))
    if asked.prompt is not None and asked.limit is not None:
        found.append(without_effect("--limit", "with --prompt"))
    if flags.experts is not None and flags.router in DECIDING:
        found.append(
            f"--router {flags.router} decides by itself, and only blends with weights of your own can be explained; "
            "use --router weighted with --weights"
        )
    if asked.compare is not None and flags.checkpoint is None:
        found.append(without_effect("--compare", "without --checkpoint; blends are compared by --compare-weights"))
    if asked.compare_weights is not None and flags.experts is None:
        found.append(without_effect("--compare-weights", "without --experts"))
    if asked.profile_rows is not None and flags.checkpoint is None:
        found.append(without_effect("--profile-rows", "without --checkpoint"))
    return found


def _explained(flags: SpeakerFlags, asked: ExplainFlags, console: "Console") -> "Explanation":
    """The explanation, with another one where something is compared."""
    from lmoe.explain.explain import Explainer
    from lmoe.explain.texts import same_tokens

    opened = flags if asked.prompt is not None else replace(flags, domain=None)
    speaker = open_speaker(opened)
    explainer = Explainer(speaker.model, _name(flags))
    texts = _texts(speaker, flags, asked)
    found = _with_progress(explainer, texts, console)
    found = _with_profiles(explainer, found, flags, asked, console)
    if asked.compare_weights is not None:
        weights = named_weights(asked.compare_weights, list(named_places(flags.experts)))
        assert speaker.blend is not None and weights is not None
        with speaker.blend.using(weights):
            other = _with_progress(Explainer(speaker.model, asked.compare_weights), texts, console)
        return replace(found, other=other)
    if asked.compare is not None:
        tokenizer = speaker.tokenizer
        del explainer, speaker
        others = open_speaker(replace(opened, checkpoint=asked.compare, revision=None))
        same_tokens(tokenizer, others.tokenizer, asked.compare)
        return replace(found, other=_with_progress(Explainer(others.model, asked.compare), texts, console))
    return found


def _texts(speaker: "Speaker", flags: SpeakerFlags, asked: ExplainFlags) -> "list[TextTokens]":
    """What is explained."""
    from lmoe.adapter.place import adapter_folder, run_folder
    from lmoe.adapter.run_data import run_data
    from lmoe.data.rows.sources import read_rows
    from lmoe.explain.of_run import validation_texts
    from lmoe.explain.texts import kept_tokens, of_rows, prompted
    from lmoe.injection.record import injected

    limit, most = asked.limit or 3, kept_tokens(speaker.model, asked.max_tokens)
    if asked.prompt is not None:
        with speaker.about():
            new = NEW_TOKENS if asked.max_new_tokens is None else asked.max_new_tokens
            text = prompted(
                speaker.model,
                speaker.tokenizer,
                asked.prompt,
                max_new_tokens=new,
                most=asked.max_tokens,
                domain=flags.domain,
            )
        return [text]
    if asked.rows is not None:
        run = None if flags.checkpoint is None else run_folder(adapter_folder(speaker.folders["checkpoint"]))
        own, _ = run_data(run)
        every = read_rows(asked.rows, columns=own.columns_of(asked.rows))
        rows = [row for row in every if flags.domain in (None, row.domain)]
        if not rows:
            raise ConfigError(f"--rows {asked.rows}: no row is of the domain {flags.domain!r}")
        return list(of_rows(speaker.tokenizer, rows[:limit], most=most, data=own))
    assert flags.checkpoint is not None
    texts, _ = validation_texts(
        speaker.folders["checkpoint"],
        injected(speaker.model).moe,
        rows=limit,
        most=most,
        domain=flags.domain,
        trust_remote_code=flags.trust_remote_code,
    )
    return texts


def _with_profiles(
    explainer: "Explainer", found: "Explanation", flags: SpeakerFlags, asked: ExplainFlags, console: "Console"
) -> "Explanation":
    """The same with what the experts do on validation rows, where there are any."""
    from lmoe.adapter.place import adapter_folder, local_checkpoint, run_folder
    from lmoe.cli.tokens_progress import TokensProgress
    from lmoe.errors import DataError, LmoeError
    from lmoe.explain.of_run import LONGEST_ROW, known_losses, validation_texts
    from lmoe.explain.texts import kept_tokens
    from lmoe.injection.record import injected
    from lmoe.report.say import say

    rows = 4 if asked.profile_rows is None else asked.profile_rows
    if flags.checkpoint is None or not rows:
        return found
    place = local_checkpoint(flags.checkpoint, flags.revision, trust_remote_code=flags.trust_remote_code)
    try:
        if run_folder(adapter_folder(place)) is None:
            raise DataError("an adapter on its own has no validation rows")
        texts, named = validation_texts(
            place,
            injected(explainer.model).moe,
            rows=rows,
            most=kept_tokens(explainer.model, min(LONGEST_ROW, asked.max_tokens)),
            trust_remote_code=flags.trust_remote_code,
        )
    except LmoeError as error:
        if asked.profile_rows is not None:
            raise
        return replace(found, notes=(*found.notes, f"experts are not shown on validation rows: {error}"))
    known = known_losses(place)
    tokens = sum(map(len, texts))
    passes = 1 if known is not None else 1 + len(explainer.subject.experts)
    say(console, f"experts on validation rows: {len(texts)} rows, {tokens * passes:,} tokens through the model")
    with TokensProgress(console, tokens * passes) as progress:
        return explainer.with_profiles(found, texts, rows=named, known=known, progress=progress.went)


def _with_progress(explainer: "Explainer", texts: "list[TextTokens]", console: "Console") -> "Explanation":
    """An explanation; what it costs is said before."""
    from lmoe.cli.tokens_progress import TokensProgress
    from lmoe.report.say import say

    work = explainer.work(texts)
    for text in texts:
        if text.cut:
            say(console, f"{text.name}: cut, {text.cut:,} tokens behind the first {len(text):,} are left out")
    say(console, f"explaining {work.line}")
    with TokensProgress(console, work.total) as progress:
        return explainer.explain(texts, progress.went)


def _name(flags: SpeakerFlags) -> str:
    """What is explained, for the page."""
    if flags.checkpoint is not None:
        return flags.checkpoint
    return flags.weights or ("equal weights" if flags.experts else str(Path(flags.model or "")))
