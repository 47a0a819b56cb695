"""`lmoe compare RUN RUN …`: runs that exist beside one another, and a verdict."""

from pathlib import Path
from typing import Any

from lmoe.cli.errors import exit_code_of
from lmoe.cli.evaluate import split
from lmoe.errors import ConfigError

LEDGER = Path("outputs/study")
"""Where studies count how often rows have judged."""


def run(
    runs: list[str],
    settings: dict[str, Any],
    *,
    names: str | None,
    domains: str | None,
    by_domain: bool,
    output: str | None,
) -> int:
    """Returns the exit code.

    Args:
        settings: fields of CompareSettings that the command line gives as they are.
        names, domains: separated by commas.
        by_domain: show each domain too.
        output: folder of compare.json and compare.csv; None: nothing is written.
    """

    def action() -> None:
        from rich.console import Console

        from lmoe.files.run_folder import path_from_here
        from lmoe.report.say import say
        from lmoe.run.announce import quiet_libraries
        from lmoe.study.compare import CompareSettings, compare_runs

        quiet_libraries()
        console = Console()
        folder = None if output is None else Path(output).expanduser()
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output {folder}: a file is there; name a folder")
        asked = CompareSettings(
            runs=tuple(runs),
            names=None if names is None else split(names, "--names"),
            domains=None if domains is None else split(domains, "--domains"),
            **settings,
        )
        found = compare_runs(asked, LEDGER, lambda line: say(console, line))
        console.print(found.tables(by_domain=by_domain))
        if folder is None:
            say(console, "\nNothing was written; --output DIR writes compare.json and compare.csv")
        else:
            files = found.write(folder)
            say(console, f"\nIn {path_from_here(folder)}: {', '.join(file.name for file in files)}")

    return exit_code_of(action)
