"""A docstring of a function that says neither what is returned nor what is done is found, and others are left alone."""

import pytest

from tools.fragments import main, problem


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Write the summary.", None),
        ("Returns the exit code.", None),
        ("Tries again.", None),
        ("Whether the run goes on.", None),
        ("The tensors of an adapter.", None),
        ("y = x W^T", None),
        ("(B, T) bool, True at labels.", None),
        ("Refuse shared modules.\n\nRaises:\n    ValueError: two paths.", None),
        ("Raises:\n    ValueError: two paths.", "says arguments or errors alone"),
        ("\n    Args:\n        x: of it.\n    ", "says arguments or errors alone"),
        ("Of a run.", "leans on the name"),
        ("Those that say which model speaks, in the order of the flags.", "leans on the name"),
        ("It is over.", "leans on the name"),
        ("The flags, checked.", "is a fragment"),
        ("(O, R). NOTE float32 is faster where memory holds it otherwise.", "is a fragment"),
        ("Names.", None),  # a verb of the list; words are read, not meaning
    ],
)
def test_the_first_sentence_says_what_is_returned_or_done(docstring, expected):
    assert problem(docstring) == expected


def test_functions_are_looked_at_and_classes_and_modules_are_not(tmp_path, capsys):
    (tmp_path / "fine.py").write_text('"""Of runs."""\n\n\nclass A:\n    """For the table."""\n')
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""
    (tmp_path / "short.py").write_text(
        'class A:\n    def b(self):\n        """Of a run."""\n\n    async def c(self): ...\n'
    )
    assert main([str(tmp_path)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path / 'short.py'}:3: leans on the name: Of a run."
    assert said[1].startswith("1 docstrings say neither")
