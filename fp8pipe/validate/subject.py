"""What a validation looks at: checkpoint, source, config, what is known of the architecture, what was measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from fp8pipe.model import fp8_source
from fp8pipe.model.headers import TensorInfo
from fp8pipe.model.names import FP8
from fp8pipe.quantize.plan.record import Plan
from fp8pipe.records import Snapshot
from fp8pipe.validate.asking import NOT_ASKED, Asked
from fp8pipe.validate.faults import Need
from fp8pipe.validate.meaning.config import quantization_config
from fp8pipe.validate.meaning.formats import Spec, by_powers
from fp8pipe.validate.meaning.layout import Layout
from fp8pipe.validate.meaning.names import (
    FLOATS,
    KV_SCALES,
    SCALES,
    WEIGHTS,
    attention_of_kv_scale,
    is_beside_decoder,
    layer_of,
    split_name,
)
from fp8pipe.validate.meaning.scheme import Scheme
from fp8pipe.validate.measured import Measured
from fp8pipe.validate.reading.checkpoint import CheckpointFiles
from fp8pipe.validate.reading.records import EngineRecords

if TYPE_CHECKING:
    from fp8pipe.oracle.loaded import Loaded

_LEFT_BY_MODELOPT = re.compile("vision_tower|vision_model|vit_large_projector")
"""Towers that vLLM never quantizes under this method, whatever is excluded."""

T = TypeVar("T")


def _given(value: T | None) -> T:
    assert value is not None, "a check that did not say what it needs"
    return value


@dataclass
class Subject:
    """One checkpoint under validation. A check may read `source`, `scheme`, ... only if it needs them."""

    files: CheckpointFiles
    config: dict[str, Any]
    """config.json; empty if it does not parse."""
    config_problem: str | None
    """What is wrong with config.json as a file."""
    quantization: dict[str, Any]
    """The quantization_config that vLLM reads; empty if there is none."""
    quantization_file: str
    """The file that it is in."""
    scheme_or_none: Scheme | None
    """What it means; None if it is not understood (C1 to C4 say why)."""
    layout: Layout
    """Which tensors play which part."""
    source_or_none: CheckpointFiles | None = None
    source_config: dict[str, Any] | None = None
    """The source's config.json: its own, else what the engine's records keep of it."""
    source_commit: str | None = None
    records_or_none: EngineRecords | None = None
    """None for checkpoints of other tools."""
    vllm: Asked = NOT_ASKED
    """What vLLM's own model and loader make of the checkpoint."""
    measured_or_none: Measured | None = None
    """What the pass over the bytes found; None if there was none."""
    loaded_or_none: tuple[Loaded, ...] | None = None
    """What transformers' loader makes of the weights of both sides; None if it was not asked."""

    @property
    def scheme(self) -> Scheme:
        return _given(self.scheme_or_none)

    @property
    def source(self) -> CheckpointFiles:
        return _given(self.source_or_none)

    @property
    def measured(self) -> Measured:
        return _given(self.measured_or_none)

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        return _given(self.loaded_or_none)

    @property
    def records(self) -> EngineRecords:
        return _given(self.records_or_none)

    @property
    def plan(self) -> Plan:
        return _given(self.records.plan)

    def supplies(self, need: Need) -> bool:
        """Whether a check that needs `need` can run."""
        records = self.records_or_none
        is_planned = records is not None and records.plan is not None
        return {
            "config": bool(self.config) or self.config_problem is None,
            "scheme": self.scheme_or_none is not None,
            "source": self.source_or_none is not None,
            "tensors": self.source_or_none is not None or is_planned,
            "files": self.source_or_none is not None or (records is not None and records.source is not None),
            "records": is_planned,
            "calibration": records is not None and records.calibration is not None,
            "manifest": records is not None and records.manifest is not None,
            "vllm": self.vllm.verdict is not None,
            "loaded": self.loaded_or_none is not None,
        }[need]

    # ------------------------------------------------------------------------------------------ quantized weights

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Modules that the config says are quantized, by name on disk, and how."""
        if self.scheme_or_none is None:
            return {}
        found = {module: self.scheme.spec_of(module) for module in self.layout.quantizable}
        stay = {module for module in self.layout.may_stay if found.get(module) and self._may_stay(module)}
        return {
            module: self._as_planned(spec) for module, spec in found.items() if spec is not None and module not in stay
        }

    def _as_planned(self, spec: Spec) -> Spec:
        """`spec` with what the recipe knows and quant_method fp8 has no key for: the observer, and how scales are
        rounded."""
        plan = self.records_or_none.plan if self.records_or_none is not None else None
        if plan is None:
            return spec
        spec = replace(spec, minmax=plan.settings.weights.observer == "minmax")
        return by_powers(spec) if plan.settings.weights.power_of_two else spec

    def weight(self, module: str) -> TensorInfo | None:
        """The weight of a module as it is stored: under the name that its scheme asks for, else under any."""
        spec = self.specs.get(module)
        return self._stored(module, (spec.weight, *WEIGHTS) if spec else WEIGHTS)

    def _stored(self, module: str, leaves: tuple[str, ...]) -> TensorInfo | None:
        return next((found for leaf in leaves if (found := self.files.tensors.get(f"{module}.{leaf}"))), None)

    def is_plain(self, module: str) -> bool:
        """Whether a module's weight is stored as floats without any scale, as in the source."""
        weight = self._stored(module, WEIGHTS)
        has_scale = any(f"{module}.{leaf}" in self.files.tensors for leaf in SCALES)
        return weight is not None and weight.dtype in FLOATS and not has_scale

    def quantized_weights(self) -> Iterator[tuple[str, TensorInfo, Spec]]:
        """(module, weight, how it must be stored) of what is quantized by config and present."""
        for module, spec in sorted(self.specs.items()):
            if (entry := self.files.tensors.get(f"{module}.{spec.weight}")) is not None:
                yield module, entry, spec

    def spec_of_weight(self, entry: TensorInfo) -> Spec | None:
        """How the tensor must be stored if it is a quantized weight; None for all others."""
        module, leaf = split_name(entry.name)
        spec = self.specs.get(module)
        return spec if spec is not None and leaf == spec.weight else None

    @cached_property
    def kv_scales(self) -> dict[str, str]:
        """KV scale tensors by name, with the module that vLLM maps them to."""
        names = (name for name in self.files.tensors if split_name(name)[1] in KV_SCALES)
        return {name: attention_of_kv_scale(split_name(name)[0]) for name in names if not self.is_of_source(name)}

    def _may_stay(self, module: str) -> bool:
        """Whether a module outside the decoder is left unquantized and vLLM does not mind, although no ignore entry has
        its name on disk."""
        if not self.is_plain(module):
            return False
        if module in self.layout.optional:
            return layer_of(f"{module}.") is None  # what joins these layers, which vLLM keeps in some formats
        if self.scheme.method == "modelopt" and _LEFT_BY_MODELOPT.search(module):
            return True
        return any(map(self.scheme.ignores, _spellings(module))) or _kin(module) in self._ignored_in_towers

    @cached_property
    def _ignored_in_towers(self) -> set[tuple[str, ...]]:
        return {_kin(entry) for entry in self.scheme.ignore if is_beside_decoder(entry)}

    # ------------------------------------------------------------------------------------------ the source

    def source_shape(self, module: str) -> tuple[int, ...] | None:
        """Shape [out, in] of a module's weight in the source; None if it is not known."""
        if (piece := self.layout.pieces.get(module)) is not None:
            return piece.rows, piece.columns
        twin = self.source_or_none.tensors.get(f"{module}.weight") if self.source_or_none else None
        return twin.shape if twin is not None else None

    @property
    def source_record(self) -> Snapshot:
        """The source's files, as the engine recorded them."""
        return _given(self.records.source)

    @property
    def source_sizes(self) -> dict[str, int]:
        """Bytes of every file of the source."""
        theirs = self.source_or_none
        return theirs.sizes if theirs is not None else {file.name: file.size for file in self.source_record.files}

    @cached_property
    def source_tensors(self) -> Mapping[str, TensorInfo] | None:
        """The source's tensors by name: its own, else what the plan recorded of them; None if neither is there."""
        if self.source_or_none is not None:
            return self.source_or_none.tensors
        return {tensor.name: tensor.info for tensor in self.plan.tensors} if self.supplies("records") else None

    @property
    def source_dtype(self) -> str | None:
        """The dtype of most of the source's weights, which is what a config without a dtype means; None if unknown."""
        if self.source_tensors is None:
            return None
        found = Counter(info.dtype for info in self.source_tensors.values())
        most = next((dtype for dtype, _ in found.most_common() if dtype in FLOATS), "")
        return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(most)

    @property
    def is_source_quantized(self) -> bool:
        """Whether the source has a quantization_config of its own, so that its scales are not the model's."""
        return self.source_config is not None and quantization_config(self.source_config) is not None

    def is_of_source(self, name: str) -> bool:
        """Whether a tensor named like a scale is the unquantized model's own parameter."""
        theirs = self.source_or_none
        return theirs is not None and name in theirs.tensors and not self.is_source_quantized

    def has_source_dtype(self, entry: TensorInfo) -> bool:
        """Whether the source has the tensor in the same dtype."""
        twin = self.source_or_none.tensors.get(entry.name) if self.source_or_none else None
        return twin is not None and twin.dtype == entry.dtype

    def source_scale(self, name: str) -> TensorInfo | None:
        """The scales of an FP8 weight of the source, which give its values; None for all other tensors."""
        theirs = self.source_or_none.tensors if self.source_or_none else {}
        info = theirs.get(name)
        if info is None or split_name(name)[1] != "weight" or info.dtype != FP8 or len(info.shape) != 2:
            return None
        return fp8_source.scale_of(name, theirs)


def _spellings(module: str) -> set[str]:
    """Names of a tower's module on disk, in transformers and in vLLM."""
    plain = module.removeprefix("model.")
    names = {plain, f"model.{plain}"}
    return names | {name.replace(".vision_model.", ".") for name in names}


def _kin(module: str) -> tuple[str, ...]:
    """First number in a name, and its last two parts."""
    numbers = re.findall(r"\.(\d+)\.", module)
    return (*numbers[:1], *module.split(".")[-2:])
