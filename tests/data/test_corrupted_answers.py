"""Wrong copies of right answers (data/corrupt_math.py, data/corrupt_sql.py): each has one mistake, and nothing else."""

import pytest

from tests.micro import ROOT

PROBLEM = "Ann has 3 bags of 12 pears and eats 5 of them. She sells the rest for $2 each. How much does she earn?"
SOLUTION = (
    "Ann has 3*12=36 pears.\nAfter eating, 36 - 5 = 31 are left of the 36.\n"
    "She earns 31 x $2 = $62 for 31 pears.\n#### 62"
)
TABLE = "Columns of table: city, crowd, team, year\nQuestion: "
QUESTION = TABLE + "What was the highest crowd in old york city before 1999?\nWrite the SQL query."
QUERY = 'SELECT MAX(crowd) FROM table WHERE city = "old york" AND year < 1999;'


@pytest.fixture
def solutions(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "data")
    from corrupt_math import corrupted_solutions  # type: ignore[import-not-found]

    return corrupted_solutions


@pytest.fixture
def queries(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "data")
    from corrupt_sql import corrupted_queries  # type: ignore[import-not-found]

    return corrupted_queries


@pytest.mark.parametrize(
    ("kind", "wrong", "larger"),
    [
        (
            "operation",
            "Ann has 3+12=15 pears.\nAfter eating, 15 - 5 = 10 are left of the 15.\n"
            "She earns 10 x $2 = $20 for 10 pears.\n#### 20",
            False,
        ),
        (
            "operand",
            "Ann has 3*12=36 pears.\nAfter eating, 36 - 3 = 33 are left of the 36.\n"
            "She earns 33 x $2 = $66 for 33 pears.\n#### 66",
            True,
        ),
        (
            "slip",
            "Ann has 3*12=36 pears.\nAfter eating, 36 - 5 = 41 are left of the 36.\n"
            "She earns 41 x $2 = $82 for 41 pears.\n#### 82",
            True,
        ),
    ],
)
def test_what_follows_from_a_wrong_step_is_worked_out_from_it(solutions, kind, wrong, larger):
    assert (kind, wrong, larger) in solutions(PROBLEM, SOLUTION)


def test_every_wrong_solution_has_another_result_that_is_not_far_off(solutions):
    found = solutions(PROBLEM, SOLUTION)
    assert {kind for kind, _, _ in found} == {"operand", "operation", "slip"}
    results = [int(wrong.rpartition("#### ")[2].replace(",", "")) for _, wrong, _ in found]
    assert 62 not in results and min(results) >= 62 / 4 and max(results) <= 62 * 4
    assert [larger for _, _, larger in found] == [result > 62 for result in results]


@pytest.mark.parametrize(
    ("problem", "solution"),
    [
        ("Of 4 pears 2 go.", "4 pears - 2 pears = 2 pears\n#### 2"),  # no equation of numbers alone
        ("Of 9 pears 2 go.", "9-2=8\n#### 8"),  # does not hold
        ("Of 9 pears 2 go, so 7?", "9-2=7\n#### 7"),  # a result that the problem names
        ("Of 9 pears 2 go.", "It is 7, since 9-2=7\n#### 7"),  # a result before its equation
        ("Of 9 pears 2 go.", "9-2=7"),  # no last line
    ],
)
def test_a_solution_that_cannot_be_followed_has_no_wrong_copy(solutions, problem, solution):
    assert solutions(problem, solution) == []


def test_numbers_stay_as_they_are_written(solutions):
    wrong = [text for _, text, _ in solutions("2 cars at $1,500 and 1 at $0.50.", "2*1,500=$3,000\n#### 3,000")]
    assert "2*1,500=$3,100\n#### 3,100" in wrong
    cents = [text for _, text, _ in solutions("3 pens at $0.50.", "3 * $0.50 = $1.50\n#### 1.50")]
    assert "3 / $0.50 = $6.00\n#### 6.00" in cents


def test_each_part_of_a_query_is_wrong_in_some_copy_and_one_part_alone(queries):
    found = queries(QUESTION, QUERY)
    assert set(found) == {
        ("selected", QUERY.replace("MAX(crowd)", "MAX(team)")),
        ("aggregate", QUERY.replace("MAX", "AVG")),
        ("aggregate", QUERY.replace("MAX", "COUNT")),
        ("aggregate", QUERY.replace("MAX", "MIN")),
        ("aggregate", QUERY.replace("MAX", "SUM")),
        ("compared", QUERY.replace("city =", "team =")),
        ("compared", QUERY.replace("year <", "team <")),
        ("operator", QUERY.replace("<", "=")),
        ("operator", QUERY.replace("<", ">")),
        ("literal", QUERY.replace("old york", "york")),
        ("literal", QUERY.replace("old york", "old")),
        ("literal", QUERY.replace("old york", "old york city")),
        *((kind, text) for kind, text in found if text[:-6] == QUERY[:-6] and kind == "literal"),  # another year
    }
    assert len([text for _, text in found if text.endswith('city = "old york" AND year < 1999;')]) == 5


def test_two_texts_may_be_exchanged(queries):
    prompt = TABLE + "Which year did reds play in rome?\nWrite the SQL query."
    query = 'SELECT year FROM table WHERE city = "rome" AND team = "reds";'
    assert ("literal", 'SELECT year FROM table WHERE city = "reds" AND team = "rome";') in queries(prompt, query)


def test_what_would_be_as_right_is_no_wrong_copy(queries):
    counted = {
        kind
        for kind, _ in queries(TABLE + "How many in rome?\n", 'SELECT COUNT(crowd) FROM table WHERE city = "rome";')
    }
    assert "selected" not in counted and "aggregate" in counted
    not_asked = queries(TABLE + "The crowd in rome?\n", 'SELECT SUM(crowd) FROM table WHERE city = "rome";')
    assert "aggregate" not in {kind for kind, _ in not_asked}


@pytest.mark.parametrize("query", ["SELECT crowd FROM table;", "SELECT A.b FROM table WHERE city = 1;", ""])
def test_another_kind_of_query_has_no_wrong_copy(queries, query):
    assert queries(QUESTION, query) == []
