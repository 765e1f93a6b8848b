"""How a release was made: an in-toto statement with SLSA's provenance, in fp8pipe/provenance.json.

    subject                every file of the checkpoint, by sha256
    externalParameters     what a person asked for: the source and the recipe
    internalParameters     the version of the engine that decided the bytes, and its fingerprint of them
    resolvedDependencies   the source at its commit, and the data of the calibration
    builder                fp8pipe, with the libraries that took part

There is no time and no place in it: the same records give the same bytes, and anyone can derive it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fp8pipe.gate.publishable import Evidence
from fp8pipe.model.identity import is_content
from fp8pipe.records import Checkpoint, FileHash
from fp8pipe.records.calibration import Calibration
from fp8pipe.records.paths import record_path

PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "pkg:pypi/fp8pipe#release-v1"


def provenance(folder: Path, evidence: Evidence, files: Sequence[FileHash]) -> bytes:
    """The statement on the checkpoint with these files, whose records are in `folder`, as JSON."""
    from google.protobuf.json_format import MessageToJson
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement

    checkpoint, candidate = evidence.checkpoint, evidence.candidate
    subjects = [
        ResourceDescriptor(name=one.name, digest={"sha256": one.sha256}).pb for one in files if is_content(one.name)
    ]
    version = candidate.versions.get("fp8pipe", "")
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "source": {"repository": checkpoint.model_id, "revision": checkpoint.source_commit},
                "recipe": evidence.plan.settings.model_dump(mode="json"),
            },
            "internalParameters": {"engine": checkpoint.engine_version, "fingerprint": checkpoint.fingerprint},
            "resolvedDependencies": list(_dependencies(folder, checkpoint)),
        },
        "runDetails": {"builder": {"id": f"pkg:pypi/fp8pipe@{version}", "version": candidate.versions}},
    }
    statement = Statement(subjects, PREDICATE, predicate)
    statement.validate()
    return MessageToJson(statement.pb, indent=1, sort_keys=True).encode() + b"\n"


def _dependencies(folder: Path, checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:  # Any: JSON
    yield _on_the_hub("", checkpoint.model_id, checkpoint.source_commit)
    if checkpoint.calibration_digest is not None:
        calibration = Calibration.load(record_path(folder, "calibration"))
        yield _on_the_hub("datasets/", calibration.dataset, calibration.dataset_revision)


def _on_the_hub(kind: str, name: str, commit: str | None) -> dict[str, Any]:
    """A resource descriptor. A local source has no commit of git's, and its name says nothing to others."""
    if commit is None or len(commit) != 40:
        return {"name": name, "annotations": {"revision": commit or ""}}
    return {"uri": f"hf://{kind}{name}@{commit}", "digest": {"gitCommit": commit}}
