"""Regular expressions of an untrusted ignore list, matched in time that grows with the name and not with its powers.

In: the `re:` entries of `ignore` or `targets`. Out: `Patterns`, which tells for a module name which of them `re.match`
would accept. All of them run at once as one automaton whose states are made when they are first met, so that each
character of a name costs one look-up; no input makes it backtrack.

Lookarounds, backreferences, flags and word boundaries are no regular language. Such a pattern is left to `re` if the
ways in which `re` can try it are few, which is known before it is tried (`_effort`); else it is refused.

Names may be chosen so that each character makes a new state of thousands of steps. All matching of one `Patterns` has
a budget, MAX_WORK; when it is spent, the patterns that spent most of it are refused.
"""

from __future__ import annotations

import math
import re
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from re import _constants as ops  # type: ignore[attr-defined]  # the standard library's own parse tree
from re import _parser as parser  # type: ignore[attr-defined]
from time import thread_time
from typing import Any

MAX_LENGTH = 1000
"""Characters of a pattern."""
MAX_STEPS = 20_000
"""Automaton steps of all patterns together: a counted repeat is written out."""
MAX_BUILT = 20 * MAX_STEPS
"""Characters, nodes and steps that are looked at to build the automaton, those of refused patterns included."""
MAX_SLOW = 16
"""Patterns left to `re`."""
MAX_NAME = 1000
"""Characters of a name that are looked at."""
MAX_EFFORT = 100_000_000
"""Steps of `re`, at worst, for the longest name: half a second."""
MAX_WORK = 20_000_000
"""Automaton steps, all names together: four seconds. They are taken to make states, each pair of a state and a
character once; the ignore list of a real model needs thousands."""
MAX_KEPT = 2_000_000
"""Steps of all states kept, 100 MB; when there are more, they are forgotten and made anew."""
_STEP_S = 2e-7
"""Seconds of an automaton step, in which the time of `re` is counted."""

CharTest = Callable[[str], bool]


class _NotRegular(Exception):
    """A construct that no automaton can follow."""


class _Spent(Exception):
    """MAX_WORK is used up."""


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


@dataclass(slots=True, eq=False)
class _State:
    """Every place in which the automaton is at once."""

    steps: frozenset[int]
    accepts: tuple[str, ...]
    """Entries matched here, wherever the name ends."""
    after: dict[str, _State] = field(default_factory=dict)
    at_end: tuple[str, ...] | None = None
    """Entries matched if the name ends here; None until a name does."""


class Patterns:
    """Compiled `re:` entries."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._steps: list[_Step] = []
        self._owners: list[str] = []
        """The entry of each step."""
        self._entry = ""
        """The one that is being built."""
        self._built = 0
        self._slow: list[tuple[str, re.Pattern[str]]] = []
        self.refused: dict[str, str] = {}
        """Entries that cannot be matched, with the reason; matching may add to them."""
        added = {entry: self._add(entry) for entry in dict.fromkeys(entries)}
        self._starts = {entry: start for entry, start in added.items() if start is not None}
        self._work = 0
        """Steps of the automaton taken to match."""
        self._spent: Counter[str] = Counter()
        """The same by entry."""
        self._kept = 0
        self._states: dict[frozenset[int], _State] = {}
        self._start = self._first()

    def matching(self, name: str) -> dict[str, int]:
        """Each entry that matches the beginning of `name` -> where its longest match ends."""
        while True:
            try:
                return self._follow(name[:MAX_NAME])
            except _Spent:
                self._refuse_heaviest()

    def matches(self, name: str) -> bool:
        """Whether any entry matches the beginning of `name`."""
        return bool(self.matching(name))

    def _follow(self, name: str) -> dict[str, int]:
        found: dict[str, int] = {}
        state = self._start
        for position, char in enumerate(name):
            if state.accepts:
                found |= dict.fromkeys(state.accepts, position)
            state = state.after.get(char) or self._advance(state, char)
            if not state.steps:
                break
        else:
            found |= dict.fromkeys(self._at_end(state), len(name))
        for entry, pattern in self._slow:
            begin = thread_time()
            match = pattern.match(name)
            work = int((thread_time() - begin) / _STEP_S)
            self._spent[entry] += work
            self._spend(work)
            if match:
                found[entry] = match.end()
        return found

    def _advance(self, state: _State, char: str) -> _State:
        self._visit(state.steps)
        steps = (self._steps[step] for step in state.steps)
        reached = self._closure([step.after for step in steps if step.test is not None and step.test(char)])
        self._visit(reached)
        after = self._states.get(reached)
        if after is None:
            if self._kept > MAX_KEPT:
                self._forget()
            after = self._states[reached] = _State(reached, self._accepted(reached))
            self._kept += 20 + len(reached)
        self._kept += 3
        state.after[char] = after
        return after

    def _at_end(self, state: _State) -> tuple[str, ...]:
        if state.at_end is None:
            self._visit(state.steps)
            state.at_end = self._accepted(self._closure(state.steps, at_start=state is self._start, at_end=True))
        return state.at_end

    def _accepted(self, steps: frozenset[int]) -> tuple[str, ...]:
        return tuple(entry for step in steps if (entry := self._steps[step].accepts) is not None)

    def _closure(self, steps: Iterable[int], *, at_start: bool = False, at_end: bool = False) -> frozenset[int]:
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

    # ------------------------------------------------------------------------------------------ budget

    def _visit(self, steps: frozenset[int]) -> None:
        self._spent.update(map(self._owners.__getitem__, steps))
        self._spend(len(steps))

    def _spend(self, work: int) -> None:
        """Raises _Spent where the work would go beyond MAX_WORK."""
        self._work += work
        if self._work > MAX_WORK:
            raise _Spent

    def _refuse_heaviest(self) -> None:
        """Refuse the entries that spent most, and what spent half as much or more; forget what they spent."""
        most = max(self._spent.values())
        for entry in [entry for entry, spent in self._spent.items() if 2 * spent >= most]:
            self.refused[entry] = f"more than {MAX_WORK} steps to match the names, most of them by this one"
            self._starts.pop(entry, None)
            del self._spent[entry]
        self._slow = [(entry, pattern) for entry, pattern in self._slow if entry not in self.refused]
        self._work = self._spent.total()
        self._forget()
        self._start = self._first()

    def _forget(self) -> None:
        """The states refer to each other: without this they would wait for the garbage collector."""
        for state in (self._start, *self._states.values()):
            state.after.clear()
        self._states.clear()
        self._kept = 0

    def _first(self) -> _State:
        """The state before the first character; it alone may take what is only at the start."""
        steps = self._closure(self._starts.values(), at_start=True)
        return _State(steps, self._accepted(steps))

    # ------------------------------------------------------------------------------------------ building

    def _add(self, entry: str) -> int | None:
        """The first step of an entry; None when it is left to `re`, or refused."""
        text = entry.removeprefix("re:")
        if len(text) > MAX_LENGTH:
            self.refused[entry] = f"more than {MAX_LENGTH} characters"
            return None
        self._built += len(text)
        if self._built > MAX_BUILT:
            self.refused[entry] = "more patterns than any real list has"
            return None
        tree = _parse(text)
        if tree is None:
            self.refused[entry] = "no regular expression"
            return None
        before, self._entry = len(self._steps), entry
        try:
            if tree.state.flags & ~re.UNICODE:
                raise _NotRegular("uses flags")
            return self._sequence(list(tree), self._new(_Step(accepts=entry)))
        except (_NotRegular, RecursionError) as error:
            reason = "nests too deeply" if isinstance(error, RecursionError) else error
            del self._steps[before:], self._owners[before:]
            if _is_cheap(tree) and len(self._slow) < MAX_SLOW:
                self._slow.append((entry, _quietly(lambda: re.compile(text))))
            else:
                self.refused[entry] = f"{reason}: the time to match it has no bound"
            return None

    def _new(self, step: _Step, weight: int = 1) -> int:
        self._built += weight
        if len(self._steps) >= MAX_STEPS or self._built > MAX_BUILT:
            raise _NotRegular(f"more than {MAX_STEPS} steps in all")
        self._steps.append(step)
        self._owners.append(self._entry)
        return len(self._steps) - 1

    def _sequence(self, nodes: list[tuple[Any, Any]], after: int) -> int:
        """Steps of the nodes one after the other, built from the last; the first of them."""
        self._built += len(nodes)  # not each makes a step
        for op, argument in reversed(nodes):
            after = self._node(op, argument, after)
        return after

    def _node(self, op: Any, argument: Any, after: int) -> int:
        if (test := _char_test(op, argument)) is not None:
            return self._new(_Step(test=test, after=after), weight=len(argument) if op is ops.IN else 1)
        if op is ops.BRANCH:
            firsts = dict.fromkeys(self._sequence(list(branch), after) for branch in argument[1])
            return self._new(_Step(free=tuple(firsts)), weight=len(argument[1]))
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
            known = len(self._steps)
            after = self._sequence(list(body), after)
            if len(self._steps) == known:
                break  # an empty body, as often as one likes
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
    return _class_test(argument[negated:], negated)


def _class_test(members: list[tuple[Any, Any]], negated: bool) -> CharTest:
    """For `[...]`: a search by halves, since a class may have a thousand members and stand in each step."""
    spans, categories = list[tuple[int, int]](), set[CharTest]()
    for op, argument in members:
        if op in (ops.LITERAL, ops.RANGE):
            spans.append((argument, argument) if op is ops.LITERAL else argument)
        elif (test := _char_test(op, argument)) is not None:
            categories.add(test)
        else:
            raise _NotRegular(f"uses {str(op).lower()}")
    spans.sort()
    lows, highs = [low for low, _ in spans], list(accumulate((high for _, high in spans), max))

    def test_class(char: str) -> bool:
        at = bisect_right(lows, ord(char))
        is_member = (at > 0 and highs[at - 1] >= ord(char)) or any(test(char) for test in categories)
        return is_member is not negated

    return test_class


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


# ---------------------------------------------------------------------------------------------- what `re` may cost


def _is_cheap(tree: Any) -> bool:
    """Whether any name is matched in at most MAX_EFFORT steps."""
    try:
        return _effort(tree, MAX_NAME)[1] <= MAX_EFFORT
    except RecursionError:
        return False


def _effort(nodes: Any, length: int) -> tuple[float, float]:
    """(ways to match, steps to try all of them) of nodes one after the other, on a name of `length`; bounds from above.

    `re` tries what follows a node once for each way in which the node matches. What lies in a lookaround is not tried
    again. Infinite where a repeat has a body of several ways, or a construct is not known here.
    """
    ways, steps = 1.0, 1.0
    for op, argument in nodes:
        more, each = _effort_of_node(op, argument, length)
        steps += ways * each
        ways *= more
    return ways, steps


def _effort_of_node(op: Any, argument: Any, length: int) -> tuple[float, float]:
    if op in _ONE_STEP:
        return 1, 1
    if op is ops.GROUPREF:
        return 1, length
    if op is ops.SUBPATTERN:
        return _effort(argument[3], length)
    if op in (ops.ASSERT, ops.ASSERT_NOT):
        return 1, _effort(argument[1], length)[1]
    if op in (ops.BRANCH, ops.GROUPREF_EXISTS):
        branches = argument[1] if op is ops.BRANCH else argument[1:]
        efforts = [_effort(branch or (), length) for branch in branches]
        return sum(ways for ways, _ in efforts), sum(steps for _, steps in efforts)
    if op not in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        return math.inf, math.inf
    least, most, body = argument
    ways, steps = _effort(body, length)
    often = min(most, max(length, least))
    if often > 1 and (often * math.log(ways) > 50 or (ways > 1 and most > least)):
        return math.inf, math.inf
    in_one = ways**often
    return (often - least + 1) * in_one, max(1, often) * in_one * steps


_ONE_STEP = (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN, ops.CATEGORY, ops.AT)
