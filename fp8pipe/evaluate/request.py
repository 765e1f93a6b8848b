"""A fully resolved evaluation: `request.json`, which the parent writes and the worker reads.

Its digest is the identity of a measurement. The content of the suite, the engine arguments, the library versions and
the class of device are part of it; the path of the model is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fp8pipe.config import EvalSuite, Parallel, TaskSpec
from fp8pipe.errors import ModelNotFound
from fp8pipe.evaluate.arguments import check_arguments
from fp8pipe.evaluate.environment import cpu_engine_arguments, library_versions
from fp8pipe.evaluate.footprint import need_of, spread
from fp8pipe.files import digest_of
from fp8pipe.machine.builds import is_cpu_build
from fp8pipe.machine.device import detect
from fp8pipe.machine.fit import Need
from fp8pipe.model.identity import folder_identity
from fp8pipe.model.untrusted import parse_json
from fp8pipe.records import PROOF_VERSION, Record, Retry


class EvalRequest(Record):
    """One measurement of one model."""

    role: Literal["baseline", "candidate"]
    model_id: str
    model: str
    """Path of the checkpoint folder; not part of the identity."""
    fingerprint: str
    folder_identity: str | None
    """Identity of a candidate's folder when the request was made; None for a baseline."""
    suite: EvalSuite
    suite_digest: str
    """`suite.digest()`, which covers the content of task files, when the request was made."""
    limit: int | None
    """Score only the first N documents of each task's permutation; None: all that the suite asks for."""
    looks: tuple[float, ...] = (1.0,)
    """Shares of the documents at which the gate decides. The documents that a look adds are scored in one pass of their
    own, and each look has a report, which answers this request cut short at that look."""
    engine: dict[str, Any]  # Any: values of vLLM's engine arguments
    """vLLM's engine arguments, defaults included."""
    versions: dict[str, str]
    """Installed versions of vllm, lm_eval, transformers and torch."""
    device_class: str
    proof_version: int = PROOF_VERSION
    """Of the module proof: a report without it, or with that of another version, is made again from its parts."""
    retries: tuple[Retry, ...] = ()
    """Reductions of the engine's arguments that earlier starts needed to fit into memory."""
    rates: str | None = None
    """Folder with the flip rates that other measurements found; not part of the identity."""

    def up_to(self, look: int) -> EvalRequest:
        """This request cut short at that look, counted from 1."""
        return self.model_copy(update={"looks": self.looks[:look]})

    @property
    def share(self) -> float:
        """Share of the documents to score by the last look."""
        return self.looks[-1]

    @property
    def reduced(self) -> dict[str, int | float]:
        """Engine arguments that replace the requested ones, so that the model fits into memory."""
        return {name: value for retry in self.retries for name, value in retry.changed.items()}

    @property
    def device(self) -> str:
        """Where vLLM serves: cpu or cuda."""
        return "cpu" if self.device_class == "cpu" else "cuda"

    @property
    def parallel(self) -> Parallel:
        """How the engine is spread over devices."""
        return Parallel.of(self.engine)

    def identity(self) -> str:
        """sha256 hex of everything that may change a result."""
        return digest_of(self.model_dump(mode="json", exclude={"model", "suite", "retries", "rates"}))

    def parts_identity(self) -> str:
        """sha256 hex of what is measured and how, but not of how many documents: equal ones can share their parts."""
        of_how_much = {"limit", "looks", "proof_version"}
        asked = self.model_dump(mode="json", exclude={"model", "suite", "retries", "rates"} | of_how_much)
        return digest_of([asked, self.reduced.get("max_model_len")])

    def rate_identity(self, task: str) -> str:
        """sha256 hex of all that the engine's flip rate on a task depends on: model, engine, versions, device and the
        task as it is asked, but neither the other tasks of the suite nor the number of documents."""
        spec = TaskSpec(num_fewshot=self.suite.tasks[task].num_fewshot)
        of_the_suite = {"name": "alone", "engine": {}, "sample_prompts": (), "serving": None}
        alone = self.suite.model_copy(update={"tasks": {task: spec}} | of_the_suite)
        engine = self.engine | self.reduced
        return digest_of([self.fingerprint, alone.digest(), engine, self.versions, self.device_class])


def request_for(
    model: Path,
    suite: EvalSuite,
    *,
    role: Literal["baseline", "candidate"],
    model_id: str,
    fingerprint: str,
    kv_cache_dtype: str = "auto",
    online: str | None = None,
    limit: int | None = None,
    looks: tuple[float, ...] = (1.0,),
    retries: tuple[Retry, ...] = (),
    rates: Path | None = None,
    trust_remote_code: bool = False,
    source_bytes: int = 0,
) -> EvalRequest:
    """The request to measure the checkpoint folder `model` on this machine.

    `online` is vLLM's `quantization` while loading; `retries` are those that the other side's engine needed, so that
    this side starts with the same engine; `rates` is the folder in which baselines share their flip rates.
    source_bytes: of the unquantized weights, by which a suite with `parallel: auto` spreads both sides alike. Raises
    ModelNotFound for a folder without config.json, ConfigError for engine arguments that do not fit, and EngineFailed
    when vLLM or lm-eval is not installed.
    """
    if not (model / "config.json").is_file():
        raise ModelNotFound(f"{model}: no config.json; expected the folder of a checkpoint")
    config = _config_of(model)
    check_arguments(suite, config)
    host = this_host()
    weights = max(_weights_of(model), source_bytes)
    parallel = spread(suite, [need_of(model_id, weights, config, suite.engine)], detect().gpus)
    return EvalRequest(
        role=role,
        model_id=model_id,
        model=str(model.resolve()),
        fingerprint=fingerprint,
        folder_identity=folder_identity(model) if role == "candidate" else None,
        suite=suite,
        suite_digest=suite.digest(),
        limit=limit,
        looks=looks,
        retries=retries,
        rates=None if rates is None else str(rates.resolve()),
        engine=_engine_arguments(
            suite, parallel, kv_cache_dtype=kv_cache_dtype, online=online, on_cpu=host.on_cpu, trusted=trust_remote_code
        ),
        versions=host.versions,
        device_class=host.device_class,
    )


def need_for(request: EvalRequest) -> Need:
    """What the request's engine must hold: the safetensors files of the folder, and its cache."""
    model, settings = Path(request.model), request.engine | request.reduced
    return need_of(request.model_id, _weights_of(model), _config_of(model), settings)


def _weights_of(model: Path) -> int:
    """Bytes of the weights in the folder."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def _config_of(model: Path) -> dict[str, Any]:
    """Content of config.json; nothing if it is no mapping."""
    config, _ = parse_json((model / "config.json").read_bytes(), constants=True)
    return config if isinstance(config, dict) else {}


def _engine_arguments(
    suite: EvalSuite, parallel: Parallel, *, kv_cache_dtype: str, online: str | None, on_cpu: bool, trusted: bool
) -> dict[str, Any]:
    """The platform's defaults, overridden by the suite, overridden by what is measured."""
    measured: dict[str, Any] = {"kv_cache_dtype": kv_cache_dtype} | ({"quantization": online} if online else {})
    measured |= {"trust_remote_code": True} if trusted else {}
    defaults = (cpu_engine_arguments(parallel) if on_cpu else {}) | {"seed": suite.seed}
    return defaults | suite.engine | parallel.arguments | measured


class Host(Record):
    """This machine, as far as results depend on it."""

    versions: dict[str, str]
    device_class: str

    @property
    def on_cpu(self) -> bool:
        """Whether vLLM serves on the CPU, with the plugin's reference kernels."""
        return is_cpu_build(self.versions["vllm"])


def this_host() -> Host:
    """Library versions and device class, without importing torch or vLLM. Raises EngineFailed if one is missing."""
    versions = library_versions()
    return Host(versions=versions, device_class="cpu" if is_cpu_build(versions["vllm"]) else detect().device_class)


def baseline_key(
    source_commit: str, suite: EvalSuite, *, looks: tuple[float, ...] = (1.0,), parallel: Parallel | None = None
) -> str:
    """Name of the folder that holds a model's baseline, which all its recipes share.

    parallel: how it is spread over devices; None: over one. Other looks make another baseline: the examples in a prompt
    may depend on which documents are scored in one pass.
    """
    host = this_host()
    versions = {name: host.versions[name] for name in ("vllm", "lm_eval", "transformers")}
    limit = None  # a baseline is measured whole; the entry stays so that keys equal those of earlier versions
    parts: list[object] = [source_commit, suite.digest(), versions, host.device_class, limit, looks]
    parts += [parallel.arguments] if parallel is not None and parallel.arguments else []
    return f"{source_commit.removeprefix('local-')[:12]}-{digest_of(parts)[:20]}"
