"""Regular expressions of an untrusted ignore list, matched in time that grows with the name and not with its powers.

In: the `re:` entries of `ignore` or `targets`. Out: `Patterns`, which tells for a module name which of them `re.match`
would accept. All of them run at once as one automaton whose states are made when they are first met, so that each
character of a name costs one look-up; no input makes it backtrack.

Lookarounds, backreferences, flags and word boundaries are no regular language. Such a pattern is left to `re` if it
has at most two open repeats and none inside another (at most the square of the name's length), else it is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from re import _constants as ops  # type: ignore[attr-defined]  # the standard library's own parse tree
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 1000
"""Characters of a pattern."""
MAX_STEPS = 20_000
"""Automaton steps of all patterns together: a counted repeat is written out."""
MAX_SLOW = 16
"""Patterns left to `re`."""
MAX_NAME = 1000
"""Characters of a name that are looked at."""
MAX_STATES = 20_000
"""States kept; when there are more, they are forgotten and made anew."""

CharTest = Callable[[str], bool]


class _NotRegular(Exception):
    """A construct that no automaton can follow."""


@dataclass(slots=True)
class _Step:
    """A place in the automaton: where to go without reading, and where on a character that passes the test."""

    test: CharTest | None = None
    after: int = -1
    free: tuple[int, ...] = ()
    at_start: bool = False
    """`free` may be gone only at the start of the name."""
    at_end: bool = False
    accepts: str | None = None
    """The entry that is matched here."""


State = frozenset[int]


class Patterns:
    """Compiled `re:` entries."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._steps: list[_Step] = []
        self._tables: dict[State, dict[str, State]] = {}
        self._slow: list[tuple[str, re.Pattern[str]]] = []
        self.refused: dict[str, str] = {}
        """Entries that cannot be matched, with the reason."""
        starts = [start for entry in dict.fromkeys(entries) if (start := self._add(entry)) is not None]
        self._start = self._closure(starts, at_start=True)

    def matching(self, name: str) -> dict[str, int]:
        """Each entry that matches the beginning of `name` -> where its longest match ends."""
        name = name[:MAX_NAME]
        found: dict[str, int] = {}
        state = self._start
        for position, char in enumerate(name):
            self._note(found, state, position)
            state = self._advance(state, char)
            if not state:
                break
        else:
            self._note(found, self._closure(state, at_start=not name, at_end=True), len(name))
        for entry, pattern in self._slow:
            if match := pattern.match(name):
                found[entry] = match.end()
        return found

    def matches(self, name: str) -> bool:
        """Whether any entry matches the beginning of `name`."""
        return bool(self.matching(name))

    def _note(self, found: dict[str, int], state: State, position: int) -> None:
        for step in state:
            if (entry := self._steps[step].accepts) is not None:
                found[entry] = position

    def _advance(self, state: State, char: str) -> State:
        table = self._tables.get(state)
        if table is None:
            if len(self._tables) >= MAX_STATES:
                self._tables.clear()
            table = self._tables.setdefault(state, {})
        after = table.get(char)
        if after is None:
            steps = (self._steps[step] for step in state)
            after = self._closure([step.after for step in steps if step.test is not None and step.test(char)])
            table[char] = after
        return after

    def _closure(self, steps: Iterable[int], *, at_start: bool = False, at_end: bool = False) -> State:
        """All places that can be reached without reading."""
        found: set[int] = set()
        waiting = list(steps)
        while waiting:
            number = waiting.pop()
            if number in found:
                continue
            found.add(number)
            step = self._steps[number]
            if (at_start or not step.at_start) and (at_end or not step.at_end):
                waiting.extend(step.free)
        return frozenset(found)

    # ------------------------------------------------------------------------------------------ building

    def _add(self, entry: str) -> int | None:
        """The first step of an entry; None when it is left to `re`, or refused."""
        text = entry.removeprefix("re:")
        if len(text) > MAX_LENGTH:
            self.refused[entry] = f"more than {MAX_LENGTH} characters"
            return None
        tree = _parse(text)
        if tree is None:
            self.refused[entry] = "no regular expression"
            return None
        before = len(self._steps)
        try:
            return self._sequence(list(tree), self._new(_Step(accepts=entry)))
        except _NotRegular as reason:
            del self._steps[before:]
            if _is_cheap(tree) and len(self._slow) < MAX_SLOW:
                self._slow.append((entry, _quietly(lambda: re.compile(text))))
            else:
                self.refused[entry] = f"{reason}: the time to match it has no bound"
            return None

    def _new(self, step: _Step) -> int:
        if len(self._steps) >= MAX_STEPS:
            raise _NotRegular(f"more than {MAX_STEPS} steps in all")
        self._steps.append(step)
        return len(self._steps) - 1

    def _sequence(self, nodes: list[tuple[Any, Any]], after: int) -> int:
        """Steps of the nodes one after the other, built from the last; the first of them."""
        for op, argument in reversed(nodes):
            after = self._node(op, argument, after)
        return after

    def _node(self, op: Any, argument: Any, after: int) -> int:
        if (test := _char_test(op, argument)) is not None:
            return self._new(_Step(test=test, after=after))
        if op is ops.BRANCH:
            return self._new(_Step(free=tuple(self._sequence(list(branch), after) for branch in argument[1])))
        if op is ops.SUBPATTERN and not argument[1] and not argument[2]:
            return self._sequence(list(argument[3]), after)
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            least, most, body = argument
            return self._repeat(least, most, body, after)
        if op is ops.AT and argument in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return self._new(_Step(free=(after,), at_start=True))
        if op is ops.AT and argument in (ops.AT_END, ops.AT_END_STRING):
            return self._new(_Step(free=(after,), at_end=True))
        raise _NotRegular(f"uses {str(op).lower()}")

    def _repeat(self, least: int, most: int, body: Any, after: int) -> int:
        if most is ops.MAXREPEAT:
            loop = self._new(_Step())
            again = self._sequence(list(body), loop)
            self._steps[loop].free = (again, after)
            after = loop
        else:
            for _ in range(most - least):
                after = self._new(_Step(free=(self._sequence(list(body), after), after)))
        for _ in range(least):
            after = self._sequence(list(body), after)
        return after


def _parse(text: str) -> Any | None:
    try:
        tree = _quietly(lambda: parser.parse(text))
        _quietly(lambda: re.compile(text))  # what parses may still not compile: a variable lookbehind
    except (re.error, RecursionError, OverflowError):
        return None
    return tree


def _quietly(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def _char_test(op: Any, argument: Any) -> CharTest | None:
    """What one character must be; None when the node is not about one character."""
    if op is ops.LITERAL:
        return chr(argument).__eq__
    if op is ops.NOT_LITERAL:
        return chr(argument).__ne__
    if op is ops.ANY:
        return "\n".__ne__
    if op is ops.CATEGORY:
        return _CATEGORIES.get(argument)
    if op is not ops.IN:
        return None
    negated = argument[0][0] is ops.NEGATE
    tests = [_member_test(*member) for member in argument[negated:]]
    return lambda char: any(test(char) for test in tests) is not negated


def _member_test(op: Any, argument: Any) -> CharTest:
    if op is ops.RANGE:
        low, high = argument
        return lambda char: low <= ord(char) <= high
    test = _char_test(op, argument)
    if test is None:
        raise _NotRegular(f"uses {str(op).lower()}")
    return test


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CATEGORIES: dict[Any, CharTest] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    ops.CATEGORY_WORD: _is_word,
    ops.CATEGORY_NOT_WORD: lambda char: not _is_word(char),
}


def _is_cheap(tree: Any) -> bool:
    """At most two repeats that can vary, none inside another."""
    depths = list(_repeats(tree, 0))
    return len(depths) <= 2 and not any(depth for depth in depths)


def _repeats(node: Any, depth: int) -> Iterator[int]:
    """For each repeat of varying count: how many such repeats it stands in."""
    if isinstance(node, tuple | list) and len(node) == 2 and node[0] in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        least, most, body = node[1]
        varies = least != most
        if varies:
            yield depth
        yield from _repeats(body, depth + varies)
    elif isinstance(node, tuple | list | parser.SubPattern):
        for part in node:
            yield from _repeats(part, depth)
