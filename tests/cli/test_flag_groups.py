"""A dataclass of flags becomes the options of a command."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from lmoe.cli.flag_groups import flags_as_options


@dataclass(slots=True, frozen=True, kw_only=True)
class Colours:
    of_wall: Annotated[str, typer.Option(help="Of the wall.")]
    of_door: Annotated[str | None, typer.Option(help="Of the door.")] = None
    coats: Annotated[int, typer.Option(min=1, help="How many.")] = 2


@pytest.fixture
def command():
    got: list = []
    app = typer.Typer()

    @app.command()
    @flags_as_options
    def paint(*, coats: Annotated[int, typer.Option(min=1, help="Coats.")] = 3, colours: Colours) -> None:
        """Paint a house."""
        got.extend((coats, colours))

    return lambda *words: (CliRunner().invoke(app, [*words], env={"COLUMNS": "200"}), got)


def test_each_field_is_an_option_with_its_type_its_help_and_its_default(command):
    done, got = command("--of-wall", "red")
    assert done.exit_code == 0 and got == [3, Colours(of_wall="red", of_door=None, coats=3)]
    assert command("--of-wall", "red", "--coats", "0")[0].exit_code == 2
    assert "Missing option '--of-wall'" in command()[0].output


def test_what_a_command_declares_too_stands_where_it_does_with_its_words(command):
    shown = command("--help")[0].output
    assert "Paint a house." in shown
    places = [shown.index(text) for text in ("--coats", "Coats.", "[default: 3]", "--of-wall", "--of-door")]
    assert places == sorted(places) and "How many." not in shown and shown.count("--coats") == 1
