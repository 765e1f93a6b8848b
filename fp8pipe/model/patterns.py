"""Regular expressions of `ignore` and `targets` lists: which of them match a module's name, as `re.match` would say.

Lists come from recipes and from untrusted configs, and a short pattern can keep Python's `re` busy for ever. A pattern
that could backtrack is therefore run by the `regex` package, which stops it after MATCH_S. A pattern that takes too
long, is absurdly large, or means different things to the two packages is refused, with the reason.

vLLM and compressed-tensors use `re.match`: a pattern is anchored at the start of a name, not at its end.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from time import thread_time
from typing import Any

import regex

MAX_LENGTH = 1000
"""Characters of a pattern."""
MAX_SIZE = 1_000_000
"""Characters of all patterns of a list, with counted repeats written out, as `regex` does: some 300 MB."""
MAX_NAME = 1000
"""Characters of a module's name; the rest is ignored."""
MATCH_S = 0.1
"""CPU seconds for one pattern on one name. A real one takes microseconds."""
PATTERN_S = 2.0
"""CPU seconds for one pattern on all names."""
LIST_S = 20.0
"""CPU seconds for all patterns on all names."""

_LINEAR = re.compile(r"(?:[^()\[\]{}*+?|\\]|\\\.)*(?:\.[*+])?(?:[^()\[\]{}*+?|\\]|\\\.|\\d)*")
"""Patterns with one repeat, of any character, at most: `re` needs no more steps than the square of a name's length.
They are nearly all that real lists hold, and a match by `regex` with a timeout takes ten times as long."""
_COUNTED = re.compile(r"\{(\d*)(,?)(\d*)\}")
"""`{3}`, `{3,}`, `{,5}` or `{3,5}`."""


class Patterns:
    """Compiled `re:` entries of one list."""

    def __init__(self, entries: Iterable[str]) -> None:
        self.refused: dict[str, str] = {}
        """Entries that cannot be matched, with the reason; matching may add to them."""
        self._linear: dict[str, re.Pattern[str]] = {}
        self._others: dict[str, Any] = {}  # Any: the regex package has no types
        self._spent: dict[str, float] = {}
        self._size, self._left = 0, LIST_S
        self._known: dict[str, dict[str, int]] = {}
        for entry in dict.fromkeys(entries):
            self._add(entry, entry.removeprefix("re:"))

    def matching(self, name: str) -> dict[str, int]:
        """Each entry that matches the beginning of `name` -> where the match ends; the end of `name` if it can."""
        if not (self._linear or self._others):
            return {}
        if (found := self._known.get(name)) is None:
            found = self._known[name] = self._match(name[:MAX_NAME])
        return found

    def matches(self, name: str) -> bool:
        """Whether any entry matches the beginning of `name`."""
        return bool(self.matching(name))

    def _match(self, name: str) -> dict[str, int]:
        began = thread_time()
        found = {entry: _end(pattern, name) for entry, pattern in self._linear.items() if pattern.match(name)}
        for entry, pattern in list(self._others.items()):
            start = thread_time()
            try:
                if pattern.match(name, timeout=MATCH_S):
                    found[entry] = _end(pattern, name, timeout=MATCH_S)
            except TimeoutError:
                self._refuse(entry, f"it takes more than {MATCH_S:g} s to match one name")
                continue
            self._spent[entry] = self._spent.get(entry, 0.0) + thread_time() - start
            if self._spent[entry] > PATTERN_S:
                self._refuse(entry, f"it takes more than {PATTERN_S:g} s to match the names")
        self._left -= thread_time() - began
        if self._left < 0:
            for entry in [*self._linear, *self._others]:
                self._refuse(entry, f"the list takes more than {LIST_S:g} s to match the names")
        return {entry: end for entry, end in found.items() if entry not in self.refused}

    def _refuse(self, entry: str, reason: str) -> None:
        """No answer may depend on when the entry was refused, so earlier answers are forgotten."""
        self.refused[entry] = reason
        self._linear.pop(entry, None)
        self._others.pop(entry, None)
        self._known.clear()

    def _add(self, entry: str, text: str) -> None:
        if len(text) > MAX_LENGTH:
            self.refused[entry] = f"more than {MAX_LENGTH} characters"
        elif reason := _unreadable(text):
            self.refused[entry] = reason
        elif self._size + (size := _written_out(text)) > MAX_SIZE:
            self.refused[entry] = f"with it, this list has more than {MAX_SIZE:,} characters, repeats written out"
        else:
            self._size += size
            self._compile(entry, text)

    def _compile(self, entry: str, text: str) -> None:
        if _LINEAR.fullmatch(text):
            self._linear[entry] = re.compile(text)
            return
        try:
            self._others[entry] = regex.compile(text, regex.VERSION0, cache_pattern=False)
        except RecursionError:
            self.refused[entry] = "nests too deeply"
        except regex.error as error:
            self.refused[entry] = f"no regular expression: {error}"


def _end(pattern: Any, name: str, **timeout: float) -> int:
    """Where the match of a pattern that matches ends."""
    return len(name) if pattern.fullmatch(name, **timeout) else pattern.match(name, **timeout).end()


def _unreadable(text: str) -> str | None:
    """Why `re` cannot read a pattern, or `regex` would read another one; else None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(text)
    except RecursionError:
        return "nests too deeply"
    except (re.error, OverflowError) as error:
        return f"no regular expression: {error}"
    except (FutureWarning, DeprecationWarning) as warning:
        return f"unclear: {warning}"
    if "{" in _COUNTED.sub("", _without_escapes(text)):
        return "a brace that counts no repeats, which the packages read differently; write \\{"
    return None


def _written_out(text: str) -> int:
    """At least the characters of a pattern whose counted repeats are written out, however they are nested."""
    size = len(text)
    for least, _, most in _COUNTED.findall(_without_escapes(text)):
        size *= max(1, int(most or least or 0))
    return size


def _without_escapes(text: str) -> str:
    return re.sub(r"\\.", "", text, flags=re.DOTALL)
