"""What became of the records: counts add up, and what is refused is named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe.data.account import NAMED, Account
from lmoe.errors import DataError

COUNT = st.integers(0, 10**9)
COUNTS = st.dictionaries(st.text(max_size=3), st.integers(1, 10**9), max_size=3)
ACCOUNT = st.builds(
    lambda **values: Account.of_json(values),
    **dict.fromkeys(("read", "bad", "truncated", "turns", "endless", "shortened"), COUNT),
    **dict.fromkeys(("dropped", "formats", "ignored"), COUNTS),
    first_bad=st.lists(st.text(max_size=3), max_size=NAMED),
)


@settings(max_examples=25, deadline=None)
@given(accounts=st.lists(ACCOUNT, max_size=3))
def test_accounts_add_up_and_come_back_from_json_equal(accounts: list[Account]) -> None:
    total = Account.sum(accounts)
    assert Account.of_json(json.loads(json.dumps(total.to_json()))) == total
    assert total.read == sum(one.read for one in accounts)
    assert total.shortened == sum(one.shortened for one in accounts)
    assert total.ignored.total() == sum(one.ignored.total() for one in accounts)
    assert total.first_bad == [problem for one in accounts for problem in one.first_bad][:NAMED]


def test_what_is_no_account_is_told_apart() -> None:
    stored = Account(read=1).to_json()
    for other in ({**stored, "more": 1}, {key: value for key, value in stored.items() if key != "ignored"}):
        with pytest.raises((TypeError, KeyError)):
            Account.of_json(other)


def refused(read: int, bad: int) -> list[str]:
    account = Account(read=read)
    for number in range(bad):
        account.refuse(f"f:{number + 1}: bad")
    with pytest.raises(DataError) as error:
        account.check()
    return str(error.value).splitlines()


def test_bad_rows_are_counted_and_the_first_five_are_named() -> None:
    Account(read=3).check()
    assert refused(1, 1) == ["f:1: bad"]
    head = "mend them, or leave them out with data.on_bad_row=drop:"
    assert refused(2000, 1) == [f"1 of 2,000 rows cannot be used; {head}", "  f:1: bad"]
    named = "  f:1, f:2, f:3, f:4, f:5: bad"  # what they share is said once
    assert refused(6, 5) == [f"5 of 6 rows cannot be used; {head}", named]
    assert refused(9, 7) == [f"7 of 9 rows cannot be used; {head}", named, "  and 2 more"]


def test_nobody_is_told_to_leave_all_rows_out() -> None:
    assert refused(2, 2) == ["2 of 2 rows cannot be used; mend them:", "  f:1, f:2: bad"]
