"""The page of families and strategies is what the generator writes."""

from tests.backbones.write_table import PAGE, page


def test_the_page_of_backbones_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.backbones.write_table"
