"""The records that travel between the rooms: frozen, JSON, written last, so that presence means complete.

A record lies beside what it describes (`DIR/fp8pipe/plan.json`, `baselines/<key>/report.json`, ...). What it says is
what was done, not what was asked.

Some records live with their rooms: Architecture, Plan, Conversion, EvalRequest, EvalPlan and others."""

from fp8pipe.records.base import RECORD_DIR, Record
from fp8pipe.records.checkpoint import (
    Checkpoint,
    FileHash,
    Manifest,
)
from fp8pipe.records.collection import CollectionChange, Reconciliation, ReleaseStatus
from fp8pipe.records.decision import (
    Approval,
    EarlierAttempt,
    GateDecision,
    RuleOutcome,
    TaskDecision,
    Verdict,
    metric_label,
)
from fp8pipe.records.evaluation import (
    EngineFacts,
    EvalReport,
    FlipRate,
    MetricSamples,
    Retry,
    SampleText,
    ServingFigures,
    TaskResult,
    mean_of_samples,
)
from fp8pipe.records.modules import PROOF_VERSION, ModuleOutput, ModuleProof
from fp8pipe.records.paths import PLOTS, RECORD_FILES, record_path
from fp8pipe.records.release import (
    VERDICT_EXIT_CODES,
    BatchEntry,
    BatchResult,
    Outcome,
    Release,
)
from fp8pipe.records.serving import Serves, Serving
from fp8pipe.records.source import Snapshot, SourceFile
from fp8pipe.records.terms import Terms
from fp8pipe.records.validation import (
    DEPTHS,
    Depth,
    Finding,
    Severity,
    ValidationReport,
)
from fp8pipe.records.verification import Proof, Verification
from fp8pipe.records.yank import Withdrawal, Yank, Yanked

__all__ = [
    "DEPTHS",
    "PLOTS",
    "PROOF_VERSION",
    "RECORD_DIR",
    "RECORD_FILES",
    "VERDICT_EXIT_CODES",
    "Approval",
    "BatchEntry",
    "BatchResult",
    "Checkpoint",
    "CollectionChange",
    "Depth",
    "EarlierAttempt",
    "EngineFacts",
    "EvalReport",
    "FileHash",
    "Finding",
    "FlipRate",
    "GateDecision",
    "Manifest",
    "MetricSamples",
    "ModuleOutput",
    "ModuleProof",
    "Outcome",
    "Proof",
    "Reconciliation",
    "Record",
    "Release",
    "ReleaseStatus",
    "Retry",
    "RuleOutcome",
    "SampleText",
    "Serves",
    "Serving",
    "ServingFigures",
    "Severity",
    "Snapshot",
    "SourceFile",
    "TaskDecision",
    "TaskResult",
    "Terms",
    "ValidationReport",
    "Verdict",
    "Verification",
    "Withdrawal",
    "Yank",
    "Yanked",
    "mean_of_samples",
    "metric_label",
    "record_path",
]
