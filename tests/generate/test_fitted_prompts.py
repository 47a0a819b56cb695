"""What centroids of experts are fitted to: what users ask first, not what a system prompt says to all of them."""

import json

import pytest

from lmoe.errors import DataError
from lmoe.generate.speaker import prompts

SYSTEM, SAID = {"role": "system", "content": "be kind"}, {"role": "assistant", "content": "hello"}


def rows(folder, *conversations) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
    return str(file)


def asking(text):
    return {"role": "user", "content": text}


def test_the_first_turn_of_the_user_counts(tmp_path):
    place = rows(tmp_path, [SYSTEM, asking("one"), SAID], [asking("two"), SAID, asking("three"), SAID])
    assert prompts(place) == ["one", "two"]
    assert prompts(place, count=1) == ["one"]


def test_rows_in_which_no_user_speaks_are_left_out_and_named_where_there_are_no_others(tmp_path):
    place = rows(tmp_path, [SYSTEM, SAID], [SYSTEM, asking("one"), SAID])
    assert prompts(place) == ["one"]
    with pytest.raises(DataError, match=r"rows\.jsonl: no row has a turn of the user"):
        prompts(rows(tmp_path, [SYSTEM, SAID]))
