"""Regular expressions of ignore lists: the answers of `re.match`, in bounded time and memory."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import peak_memory_mb
from support.settings import CALM

from fp8pipe.model.patterns import Patterns

TAILS = ["", "$", "b", "(a|b)", "[^a]", "a{1,3}", ".*c", r"\d?", "(ab)*"]


@given(st.text("ab.c1_", max_size=12), st.sampled_from(TAILS))
@settings(max_examples=300, **CALM)
def test_patterns_match_what_re_matches(name: str, tail: str) -> None:
    heads = ("", "a", ".*", "(a|ab)", "[ab.]+?", r"\w*\.", "^a?", "(?:b|c.){0,2}", "(?!a)", "(?i)A", r"[^\d_b-d]")
    for head in heads:
        pattern = head + tail
        found = Patterns([f"re:{pattern}"])
        assert not found.refused
        assert found.matches(name) is (re.match(pattern, name) is not None), pattern


def test_where_a_match_ends_tells_whether_a_pattern_names_the_whole_module() -> None:
    patterns = Patterns(["re:.*mlp.gate", r"re:.*mlp\.gate$", "re:(model|model.layers)"])
    assert patterns.matching("layers.0.mlp.gate_proj") == {"re:.*mlp.gate": 17}
    assert patterns.matching("layers.0.mlp.gate") == {"re:.*mlp.gate": 17, r"re:.*mlp\.gate$": 17}
    assert patterns.matching("model.layers") == {"re:(model|model.layers)": 12}


def test_patterns_of_real_models_are_matched_however_many_names_there_are() -> None:
    entries = [
        *("re:.*lm_head", r"re:.*mlp\.gate$", r"re:^(?!.*experts).*norm$", r"re:.*(?<!shared_)experts\.0\..*$"),
        *("re:(?i).*VISUAL.*", r"re:^(?!.*mtp)model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\b"),
        *(rf"re:.*layers\.{layer}\.mlp\.gate$" for layer in range(500)),
    ]
    patterns = Patterns(entries)
    for layer in range(60):
        for expert in range(128):
            found = patterns.matching(f"model.layers.{layer}.mlp.experts.{expert}.gate_proj")
            assert set(found) == {entries[5], *([entries[3]] if expert == 0 else [])}
    assert not patterns.refused


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("x" * 100_000, "more than 1000 characters"),
        ("(model", "no regular expression: missing )"),
        ("a{65000}{65000}", "no regular expression: multiple repeat"),
        (r"\b(?:\b){4000000000}!", "repeats written out"),
        (r"(?:(?:(?:a?){1000}){1000}){1000}!", "repeats written out"),
        ("(" * 333 + "a" + ")*" * 333, "nests too deeply"),
        (r"\\{e<=3}", "a brace that counts no repeats"),
        ("[[:alpha:]]", "Possible nested set"),
    ],
)
def test_pattern_that_cannot_be_read_safely_is_refused_with_the_reason(pattern: str, reason: str) -> None:
    patterns = Patterns([f"re:{pattern}", "re:a"])
    assert patterns.refused.keys() == {f"re:{pattern}"}
    assert reason in patterns.refused[f"re:{pattern}"]
    assert patterns.matches("a")


BACKTRACKING = [
    *("(?=(a+)+b)", r"(a+)\1+b+", r"\b(?:a|aa)*!", r"\b(?:a?){60}a{60}!", r"\b" + "(?:a|ab)" * 60 + "!"),
    *("(.*)*(.*)*!x", ".*" * 40 + "x", "(a|a)*b", "(model|m.*|mo.*l|.*)*Q", "(?P<n>a)(?(n)b|c)", r"\b.*.*x"),
    "(a?)" * 100 + r"\1" * 60 + "x",
]


@pytest.mark.parametrize("pattern", BACKTRACKING)
def test_pattern_that_would_backtrack_for_ever_is_answered_or_refused(pattern: str) -> None:
    """`re` needs more than a lifetime for some of them; none of them matches this name."""
    patterns = Patterns([f"re:{pattern}"])
    assert not patterns.matches("a" * 59 + "!" + "model." * 150)


def test_list_of_patterns_that_are_too_slow_together_is_refused_and_the_others_still_match() -> None:
    slow = ["re:" + "(a?)" * 200 + r"\1" * (60 + number) + "!" for number in range(3)]
    patterns = Patterns([*slow, "re:.*lm_head$"])
    assert not patterns.matches("a" * 999 + "!")
    assert patterns.refused.keys() == set(slow)
    assert all("more than" in reason for reason in patterns.refused.values())
    assert patterns.matches("lm_head")


MANY_COUNTED = """
import random
from fp8pipe.model.patterns import Patterns
heavy = [f"re:(?:{'a' + '(?:)' * 200}){{{19_000 + number}}}!" for number in range(1000)]
counted = [f"re:.*a.{{{900 - number}}}x" for number in range(22)]
patterns = Patterns([*heavy, *counted])
assert set(heavy) == set(patterns.refused)
random.seed(1)
for _ in range(100):
    assert not patterns.matches("".join(random.choices("ab", k=1000)))
"""


def test_counted_repeats_cost_little_memory() -> None:
    assert peak_memory_mb(MANY_COUNTED) < 400
