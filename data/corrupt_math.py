"""Wrong copies of a worked solution of GSM8K: one step is wrong, and what follows is worked out from it.

A solution is read as its numbers and its equations (`3 * $15 = $45`). A change of one equation gives it another result;
every later place of the old result takes the new one, equations that use it are worked out anew, and so is the last
line `#### N`. A solution is passed over where that cannot be told for sure: an `=` that is no equation of numbers, an
equation that does not hold, or a result that also stands in the problem or before its own equation.
"""

import ast
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

KINDS = ("operand", "operation", "slip")
"""Another number of the problem or of an earlier step is put in; another operation; a result that is miscalculated."""
MOST_TIMES = 4
"""A wrong last number is at most so many times the right one, and at least that part of it."""

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_TERM = rf"\(?\s*\$?{_NUMBER}%?\s*\)?"
_EQUATION = re.compile(
    rf"(?<![\d.,)] )(?P<left>{_TERM}(?:\s*[-+*/x]\s*{_TERM})+)\s*=\s*\$?(?P<right>{_NUMBER})(?![%\d])"
)
_NUMBERS = re.compile(_NUMBER)
_PARTS = re.compile(rf"(?P<number>{_NUMBER})|(?P<sign>[-+*/x])")
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@dataclass(slots=True, frozen=True)
class Equation:
    """Where an equation stands in its solution.

    Args:
        left: begin and end of what is worked out.
        right: begin and end of the number that it gives.
    """

    left: tuple[int, int]
    right: tuple[int, int]


@dataclass(slots=True, frozen=True)
class Change:
    """What is wrong in one equation.

    Args:
        kind: one of KINDS.
        at: where the number or sign that is replaced begins in the solution.
        new: what it is replaced by.
    """

    kind: str
    at: int
    new: str


def corrupted_solutions(problem: str, solution: str) -> list[tuple[str, str, bool]]:
    """Kind and text of each wrong copy, and whether its last number is too large."""
    equations = _equations(solution)
    if equations is None:
        return []
    given = {value_of(text) for text in _NUMBERS.findall(problem)}
    right, found = last_number(solution), {}
    for change in _changes(given, solution, equations):
        wrong = _worked_out(given, solution, equations, change)
        if wrong is None:
            continue
        number = last_number(wrong)
        if number != right and right / MOST_TIMES <= number <= right * MOST_TIMES:
            found.setdefault(wrong, (change.kind, wrong, number > right))
    return list(found.values())


def value_of(text: str) -> Fraction:
    """The number that a text such as 1,250.5 stands for."""
    return Fraction(text.replace(",", ""))


def last_number(solution: str) -> Fraction:
    """N of the last line `#### N`."""
    return value_of(_NUMBERS.findall(solution.rpartition("####")[2])[0])


def _equations(solution: str) -> list[Equation] | None:
    """All equations in their order; None: there is none, or something that cannot be followed."""
    steps, _, end = solution.rpartition("####")
    found = [Equation(match.span("left"), match.span("right")) for match in _EQUATION.finditer(steps)]
    if not found or steps.count("=") != len(found) or not re.fullmatch(rf" {_NUMBER}", end):
        return None
    for one in found:
        if _value(solution[slice(*one.left)]) != value_of(solution[slice(*one.right)]):
            return None
    return found


def _value(left: str) -> Fraction | None:
    """What the left side of an equation gives, as `2 * (3 + $1,000) - 50%`; None: it divides by 0, or is cut off."""
    plain = re.sub(rf"({_NUMBER})%", r"(\1/100)", left.replace("$", "")).replace("x", "*").replace(",", "")
    try:
        return _worth(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None


def _worth(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_worth(node.left), _worth(node.right))
    if not isinstance(node, ast.Constant):
        raise SyntaxError("no sum of numbers")
    return Fraction(str(node.value))


def _changes(given: set[Fraction], solution: str, equations: list[Equation]) -> Iterator[Change]:
    """Everything that may be wrong in one equation."""
    known = [_written(number) for number in sorted(given)]
    for one in equations:
        for part in _PARTS.finditer(solution, *one.left):
            if part["sign"]:
                own = "*" if part["sign"] == "x" else part["sign"]
                yield from (Change("operation", part.start(), new) for new in "+-*/" if new != own)
            else:
                yield from (Change("operand", part.start(), new) for new in known)
        result = value_of(solution[slice(*one.right)])
        yield from (Change("slip", one.right[0], _written(result + by)) for by in _slips(result))
        known.append(_written(result))


def _slips(result: Fraction) -> Iterator[int]:
    """By how much a result may be wrong: 1 or 2, or in its tens or hundreds."""
    for size in (1, 2, 10, 100):
        if size * 2 <= result:
            yield from (size, -size)


def _written(number: Fraction) -> str:
    """A number with at most two decimals as text; what needs more is cut, and so no longer the number."""
    return str(number.numerator) if number.denominator == 1 else f"{float(number):.2f}"


def _like(old: str, number: Fraction) -> str | None:
    """A number written as another one was; None: it is below 1, or has more decimals."""
    decimals = len(old.partition(".")[2])
    if number <= 0 or (number * 10**decimals).denominator != 1:
        return None
    text = f"{float(number):.{decimals}f}"
    whole, dot, rest = text.partition(".")
    return f"{int(whole):,}{dot}{rest}" if "," in old or (len(old.partition(".")[0]) < 4 <= len(whole)) else text


def _worked_out(given: set[Fraction], solution: str, equations: list[Equation], change: Change) -> str | None:
    """The solution with a change and all that follows from it; None: it cannot be followed."""
    results = {one.right[0]: one for one in equations}
    moved: dict[Fraction, Fraction] = {}  # results that are others now
    seen = set(given)
    written: dict[int, str] = {}  # what now stands where a number or sign began
    for part in _PARTS.finditer(solution):
        start, old = part.start(), part[0]
        if part["sign"] or (change.at == start and change.kind == "operand"):
            written[start] = change.new if change.at == start else old
            seen |= {value_of(old)} if part["number"] else set()
            continue
        before = value_of(old)
        number = moved.get(before, before)
        if start in results:
            slip = value_of(change.new) if change.at == start else None
            number = slip or _value(_rewritten(solution, results[start].left, written))
            if number is None or not _moves(before, number, moved, seen):
                return None
        text = old if number == before else _like(old, number)
        if text is None:
            return None
        written[start] = text
        seen.add(before)
    wrong = _rewritten(solution, (0, len(solution)), written)
    return wrong if wrong != solution else None


def _moves(before: Fraction, number: Fraction, moved: dict[Fraction, Fraction], seen: set[Fraction]) -> bool:
    """Whether every later place of a result can be told to be that result, which is then kept in `moved`."""
    if number == before:
        return before not in moved
    if before in seen or moved.get(before, number) != number:
        return False
    moved[before] = number
    return True


def _rewritten(solution: str, span: tuple[int, int], written: dict[int, str]) -> str:
    """A part of the solution with what now stands in place of its numbers and signs."""
    text, end = "", span[0]
    for part in _PARTS.finditer(solution, *span):
        text += solution[end : part.start()] + written[part.start()]
        end = part.end()
    return text + solution[end : span[1]]
