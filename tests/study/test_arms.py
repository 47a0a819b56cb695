"""Names of folders that tuned values make."""

from lmoe.study.arms import values_text


def test_numbers_and_words_are_named_as_they_are():
    assert values_text((("optim.lr", 1e-12), ("moe", "top_k"), ("a", None), ("b", -1))) == (
        "optim.lr=1e-12,moe=top_k,a=null,b=-1"
    )
    assert values_text(()) == "as_given"


def test_values_that_differ_have_folders_that_differ():
    values = ["a b", "a/b", "a_b", [1, 2], [12], {"a": 1}, "x" * 300, "x" * 301, "ü" * 200, "1,k=2"]
    names = [values_text((("k", value),)) for value in values]
    assert len(set(names)) == len(values)
    assert all(len(name.encode()) <= 140 and "/" not in name and " " not in name for name in names)
