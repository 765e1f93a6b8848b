"""Policy around the stages: retries, concurrency, run names, artifacts. A task has the name of the stage that it calls.

`ask` and `question` call none: they are about the person who decides.
"""

from tasks.collection import collection_status, reconcile
from tasks.evaluate import evaluate_baseline, evaluate_candidate
from tasks.gate import approve, ask, gate, plan_evaluation, question
from tasks.publish import check_target, publish
from tasks.quantize import calibrate, quantize
from tasks.source import download, pin, plan, require_machine
from tasks.validate import validate
from tasks.yank import yank

__all__ = [
    "approve",
    "ask",
    "calibrate",
    "check_target",
    "collection_status",
    "download",
    "evaluate_baseline",
    "evaluate_candidate",
    "gate",
    "pin",
    "plan",
    "plan_evaluation",
    "publish",
    "quantize",
    "question",
    "reconcile",
    "require_machine",
    "validate",
    "yank",
]
