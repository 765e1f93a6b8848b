"""The gate: may this checkpoint be released?

    decide(baseline, candidate, policy, checkpoint=..., suite=..., recipe=...) -> GateDecision

`decide` is pure: it reads no file, clock or network. Rules come first (`rules/`); a broken one rejects whatever the
numbers say. Then comes one paired test per metric (`statistics.py`): accepted if every drop is shown to be below its
margin, rejected if any is shown to be above, otherwise inconclusive. The decision holds every number that was compared
and one line of reason per rule and task.

`publishable.py` says whether a checkpoint folder may be published, `approval.py` records a person's decision,
`evaluation_plan.py` works out beforehand what a suite can show, and `foreign.py` reads other people's runs.
"""

from fp8pipe.gate.decision import decide

__all__ = ["decide"]
