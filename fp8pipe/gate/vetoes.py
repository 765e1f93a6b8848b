"""The rules that come before any statistics: whether the two reports measure the same thing, on the thing itself.

A broken rule is a veto; a rule whose evidence is missing is `unchecked`, never passed.
"""

from __future__ import annotations

from fp8pipe.gate import rules_candidate, rules_samples, rules_serving, rules_setting
from fp8pipe.gate.evidence import Evidence, Rule
from fp8pipe.records import RuleOutcome

RULES: dict[str, Rule] = {
    "metrics": rules_samples.metrics,
    "samples": rules_samples.samples,
    "completeness": rules_samples.completeness,
    "suite": rules_setting.suite,
    "versions": rules_setting.versions,
    "templates": rules_setting.templates,
    "seeds": rules_setting.seeds,
    "shots": rules_setting.shots,
    "bos": rules_setting.bos,
    "context": rules_setting.context,
    "tokenizer": rules_setting.tokenizer,
    "dtype": rules_setting.dtype,
    "device": rules_setting.device,
    "chance": rules_setting.chance,
    "fingerprint": rules_candidate.fingerprint,
    "kernels": rules_candidate.kernels,
    "kv_cache": rules_candidate.kv_cache,
    "extraction": rules_candidate.extraction,
    "truncation": rules_candidate.truncation,
    "size": rules_candidate.size,
    "speed": rules_serving.speed,
    "memory": rules_serving.memory,
}
"""Every rule by its id, in the order of the decision."""


def apply_rules(evidence: Evidence) -> tuple[RuleOutcome, ...]:
    """Every rule, in order, whatever the others say."""
    answers = ((name, rule(evidence)) for name, rule in RULES.items())
    return tuple(RuleOutcome(rule=name, outcome=a.outcome, reason=a.reason) for name, a in answers)
