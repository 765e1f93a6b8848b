"""What one evaluation is asked to do, resolved: the file `request.json` between parent and worker.

Its digest is the identity of a measurement. Where the model lies and which interpreter measures it are not part of it;
the content of the suite, the engine's arguments, the library versions and the class of device are.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from typing import Any, Literal

from fp8pipe.config import EvalSuite
from fp8pipe.errors import EngineFailed
from fp8pipe.evaluate.environment import CPU_ENGINE_ARGUMENTS, is_cpu_build, library_versions
from fp8pipe.files import digest_of
from fp8pipe.records import Record, Retry


class EvalRequest(Record):
    """One model to be measured once."""

    role: Literal["baseline", "candidate"]
    model_id: str
    model: str
    """Folder of the checkpoint. Not identity."""
    fingerprint: str
    folder_identity: str | None
    """Identity of a candidate's folder when the request was made; None for a baseline."""
    suite: EvalSuite
    suite_digest: str
    """Digest of the suite with the content of its task files, when the request was made."""
    limit: int | None
    """Score only the first N documents of each task's permutation."""
    looks: tuple[float, ...] = (1.0,)
    """Shares of them at which a gate looks, up to this look: each look's documents are asked in a go of their own."""
    engine: dict[str, Any]  # Any: values of vLLM's engine arguments
    """Arguments for vLLM, after defaults."""
    versions: dict[str, str]
    """vllm, lm_eval, transformers, torch, as installed where the worker runs."""
    device_class: str
    retries: tuple[Retry, ...] = ()
    """What has been tried already and needed more memory than there is."""

    @property
    def share(self) -> float:
        """The share of the documents that is scored, rounded up."""
        return self.looks[-1]

    @property
    def reduced(self) -> dict[str, int | float]:
        """Engine arguments that replace those asked for, so that the model fits."""
        return {name: value for retry in self.retries for name, value in retry.changed.items()}

    def identity(self) -> str:
        """Digest of everything that may change a result."""
        return digest_of(self.model_dump(mode="json", exclude={"model", "suite", "retries"}))

    def subject(self) -> str:
        """Digest of what is measured and how, whatever the number of documents: parts of equal ones can be joined."""
        asked = self.model_dump(mode="json", exclude={"model", "suite", "limit", "looks", "retries"})
        return digest_of([asked, self.reduced.get("max_model_len")])


class Setting(Record):
    """Where an evaluation runs, as far as results depend on it."""

    versions: dict[str, str]
    device_class: str

    @property
    def on_cpu(self) -> bool:
        """vLLM serves on the CPU, with the plugin's reference kernels."""
        return is_cpu_build(self.versions["vllm"])


def setting(python: str | None = None) -> Setting:
    """Versions and device class, without importing torch or vLLM; EngineFailed when vLLM or lm-eval is missing."""
    from fp8pipe.machine.device import detect

    try:
        versions = library_versions(python)
    except importlib.metadata.PackageNotFoundError as error:
        raise EngineFailed(f"{error}; evaluating needs vLLM and lm-eval: install the cpu or gpu extra") from error
    except subprocess.CalledProcessError as error:
        last_line = error.stderr.strip().rpartition("\n")[2]
        raise EngineFailed(f"{python}: cannot tell its vLLM and lm-eval versions: {last_line}") from error
    except OSError as error:
        raise EngineFailed(f"{python}: not an interpreter that can be started: {error}") from error
    return Setting(versions=versions, device_class="cpu" if is_cpu_build(versions["vllm"]) else detect().device_class)


def engine_arguments(suite: EvalSuite, *, kv_cache_dtype: str, online: str | None, on_cpu: bool) -> dict[str, Any]:
    """Defaults of the platform, then the suite's wishes, then what is being measured."""
    subject = {"kv_cache_dtype": kv_cache_dtype} | ({"quantization": online} if online else {})
    return (CPU_ENGINE_ARGUMENTS if on_cpu else {}) | {"seed": suite.seed} | suite.engine | subject


def baseline_key(
    source_commit: str,
    suite: EvalSuite,
    *,
    limit: int | None = None,
    looks: tuple[float, ...] = (1.0,),
    python: str | None = None,
) -> str:
    """Name of the folder that caches a baseline: all recipes of one model, measured alike, share it.

    A prompt's examples may depend on which documents are asked in one go, so baselines of other looks are others.
    """
    where = setting(python)
    versions = {name: where.versions[name] for name in ("vllm", "lm_eval", "transformers")}
    parts = [source_commit, suite.digest(), versions, where.device_class, limit, looks]
    return f"{source_commit.removeprefix('local-')[:12]}-{digest_of(parts)[:20]}"
