"""The rules: questions that come before any statistics. Do the two reports measure the same thing, on the right model?

A broken rule is a veto. A rule that lacks the facts it needs is `unchecked`, never passed.
"""

from __future__ import annotations

from fp8pipe.gate.rules import candidate, modules, samples, serving, setting
from fp8pipe.gate.rules.pair import Pair, Rule
from fp8pipe.records import RuleOutcome

RULES: dict[str, Rule] = {
    "metrics": samples.metrics,
    "samples": samples.samples,
    "completeness": samples.completeness,
    "suite": setting.suite,
    "versions": setting.versions,
    "templates": setting.templates,
    "seeds": setting.seeds,
    "shots": setting.shots,
    "bos": setting.bos,
    "context": setting.context,
    "tokenizer": setting.tokenizer,
    "dtype": setting.dtype,
    "device": setting.device,
    "parallelism": setting.parallelism,
    "chance": setting.chance,
    "fingerprint": candidate.fingerprint,
    "kernels": candidate.kernels,
    "modules": modules.modules,
    "kv_cache": candidate.kv_cache,
    "extraction": candidate.extraction,
    "truncation": candidate.truncation,
    "size": candidate.size,
    "speed": serving.speed,
    "memory": serving.memory,
}
"""Every rule by its id, in the order in which a decision lists them."""


def apply_rules(pair: Pair) -> tuple[RuleOutcome, ...]:
    """The rulings of all rules, in order. No ruling depends on another."""
    rulings = ((name, rule(pair)) for name, rule in RULES.items())
    return tuple(RuleOutcome(rule=name, outcome=ruling.outcome, reason=ruling.reason) for name, ruling in rulings)
