"""`lmoe push`: an adapter or an exported model to the Hugging Face hub, private unless asked otherwise."""

import sys
from typing import TYPE_CHECKING, Any

from lmoe.cli.commands import shell_command
from lmoe.cli.errors import exit_code_of, with_flags
from lmoe.errors import LmoeError

if TYPE_CHECKING:
    from lmoe.hub.push import Push


def run(settings: dict[str, Any], *, dry_run: bool) -> int:
    """Returns the exit code.

    Args:
        settings: fields of PushSettings.
        dry_run: say what would go, and send nothing.
    """

    def action() -> None:
        from lmoe.hub.push import PushSettings, planned_removals, prepared, push
        from lmoe.run.announce import quiet_libraries

        quiet_libraries()
        asked = PushSettings(**settings)
        if dry_run:
            planned = prepared(asked, wording=shell_command)
            _say(contents_lines(planned, planned_removals(planned)))
            return
        address = push(asked, say=lambda warning: _say([_warning(warning)]), wording=shell_command)
        _say([f"pushed to {asked.name}: {address}"])

    return exit_code_of(action)


def contents_lines(planned: "Push", removals: list[str] | None) -> list[str]:
    """What would go and what would be taken away, line by line, and the card.

    Args:
        removals: paths in the repository; None: they are not known.
    """
    settings, sizes = planned.settings, planned.sizes()
    width = max(len(name) for name in sizes)
    where = f"{settings.name}, {'public' if settings.public else 'private'}, branch {settings.revision or 'main'}"
    return [
        f"{where}: {len(sizes)} files, {sum(sizes.values()):,} bytes",
        *(f"  {name:<{width}}  {size:>15,}" for name, size in sizes.items()),
        *_removed(removals),
        *map(_warning, planned.warnings()),
        "nothing is sent (--dry-run). README.md would be:",
        "",
        planned.card,
    ]


def _removed(removals: list[str] | None) -> list[str]:
    if removals is None:
        return ["files of an earlier push that would be taken away are not known: the hub was not asked"]
    return [f"an earlier push has left {name} there, which would be taken away" for name in removals]


def _warning(text: str) -> str:
    return f"warning: {with_flags(LmoeError(text))}"


def _say(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
