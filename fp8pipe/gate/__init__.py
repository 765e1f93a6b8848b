"""Two EvalReports and a GatePolicy in, one GateDecision out. Pure: no file, clock or network.

    decide(baseline, candidate, policy, checkpoint=..., suite=..., recipe=...) -> GateDecision

Rules first (`vetoes.py`): a broken one rejects, whatever the numbers say. Then one paired test per task
(`statistics.py`): accepted when the drop is shown to be below its margin on every task, rejected when it is shown to be
above on any, else inconclusive. Every number compared is in the decision, with one line of reason per rule and task.
"""

from fp8pipe.gate.decision import decide

__all__ = ["decide"]
