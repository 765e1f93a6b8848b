"""The child process that builds vLLM's models on the meta device and follows their loaders.

    python -m fp8pipe.oracle.vllm_probe REQUESTS ANSWERS

REQUESTS: one JSON object per line, {"folder": path with config.json, "tensors": {name: [dtype, shape]}}, and if wanted
another one as "source", about which vLLM is asked too if the first has a fault. ANSWERS: one line per request, the
fields of `vllm.Answer`, and as "source" those of the source, or null. Kernels are never run; where this machine has
none for a scheme, a stand-in is chosen.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.evaluate.environment import import_architecture, prepare_process
from fp8pipe.oracle import asked, bounds, limits, stand_ins

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from vllm.model_executor.layers.quantization import QuantizationConfig

    from fp8pipe.oracle.landing import Follower, Write

MAX_REFUSALS = 20
"""After this many refused tensors the others are not tried: what is wrong is known by then."""

_FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
"""Dtypes that vLLM may cast to one another without changing what the numbers mean."""

FOREIGN = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, IndexError, KeyError, NotImplementedError, OSError),
    *(RuntimeError, StopIteration, TypeError, ValueError),
)
"""Exceptions that vLLM raises on a checkpoint that it cannot load, on purpose or not."""

_DTYPES = """
    BOOL:bool U8:uint8 I8:int8 U16:uint16 I16:int16 U32:uint32 I32:int32 U64:uint64 I64:int64
    F8_E4M3:float8_e4m3fn F8_E5M2:float8_e5m2 F8_E8M0:float8_e8m0fnu F8_E4M3FNUZ:float8_e4m3fnuz
    F8_E5M2FNUZ:float8_e5m2fnuz F16:float16 BF16:bfloat16 F32:float32 F64:float64 C64:complex64
"""
"""Names of dtypes in safetensors, with those in torch."""

_KV_LEAVES = frozenset(("k_scale", "v_scale"))


def main() -> None:
    path = Path(sys.argv[2])
    requests = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    prepare(path.with_name("store"))
    with path.open("w") as answers:
        for request in requests:
            answers.write(json.dumps(_attend(request)) + "\n")
            answers.flush()


def prepare(store: Path) -> None:
    """Make this process one that can build vLLM's models; `store` is a file that this creates."""
    prepare_process()
    stand_ins.offer()
    _enter_world(store)


def _attend(request: dict[str, Any]) -> dict[str, Any]:
    answer = _examine(Path(request["folder"]), request["tensors"])
    source = request.get("source") if answer["refusal"] or answer["mismatches"] else None
    return answer | {"source": source and _examine(Path(source["folder"]), source["tensors"])}


def _examine(folder: Path, tensors: dict[str, tuple[str, list[int]]]) -> dict[str, Any]:
    texts = dict.fromkeys(("refusal", "lacks", "limit"), "")
    answer: dict[str, Any] = {"parameters": [], "landings": [], "mismatches": []} | texts
    try:
        layers: asked.Asked = {}
        with built(folder, layers, tensors=len(tensors)) as model:
            answer["parameters"] = _parameters(model)
            if tensors:
                follow_loader(model, tensors, answer)
            asked_as = asked.by_module(model, layers)
            for mismatch in answer["mismatches"]:
                mismatch.append(asked_as.get(mismatch[2].rpartition(".")[0], ""))
    except ImportError as error:
        answer["lacks"] = getattr(error, "name", None) or _words(error)
    except MemoryError:
        raise  # the machine's fault, not the checkpoint's
    except Exception as error:
        words = _words(error).replace(str(folder), ".")
        answer["limit" if limits.is_limit(error) else "refusal"] = words
    return answer


# ---------------------------------------------------------------------------------------------- building


@contextlib.contextmanager
def built(
    folder: Path,
    layers: asked.Asked | None = None,
    *,
    tensors: int = bounds.UNKNOWN_TENSORS,
    quant_config: QuantizationConfig | None = None,
    trust_remote_code: bool = False,
) -> Iterator[nn.Module]:
    """vLLM's model for the config.json in `folder`, on the meta device, for a single process. `layers` gets those that
    asked for a quantization method. `tensors`, of which so many lie on disk, bound the model's parts. `quant_config`
    stands in for the quantization that an unquantized config lacks."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    import_architecture(str(folder), trust_remote_code)
    arguments = EngineArgs(
        model=str(folder),
        load_format="dummy",
        enforce_eager=True,
        skip_tokenizer_init=True,
        trust_remote_code=trust_remote_code,
    )
    with bounds.building(tensors):
        config = arguments.create_engine_config()
    config.quant_config = quant_config or config.quant_config
    with set_current_vllm_config(config):
        initialize_model_parallel(1)  # for each model, since experts have a group of their own
        try:
            noting = asked.noted(config.quant_config, {} if layers is None else layers)
            dtype = set_default_torch_dtype(config.model_config.dtype)
            with bounds.building(tensors), torch.device("meta"), dtype, noting:
                model = initialize_model(config)
            yield model
        finally:
            destroy_model_parallel()


def _enter_world(store: Path) -> None:
    """Initialise the distributed environment that every vLLM model needs; `store` is a file that this creates."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")


def _parameters(model: nn.Module) -> list[list[Any]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        [name, _dtype_name(parameter.dtype), list(parameter.shape), _method(modules[name.rpartition(".")[0]])]
        for name, parameter in model.named_parameters()
    ]


def _method(module: nn.Module) -> str:
    method = getattr(module, "quant_method", None)
    scheme = getattr(module, "scheme", None)
    return "" if method is None else type(method if scheme is None else scheme).__name__


# ---------------------------------------------------------------------------------------------- following


def follow_loader(model: nn.Module, tensors: Mapping[str, tuple[str, list[int]]], answer: dict[str, Any]) -> None:
    """Run `model.load_weights` on stand-ins for `tensors`, and again without those that it refuses."""
    from fp8pipe.oracle.landing import Follower

    refused: dict[str, list[Any]] = {}
    while True:
        follower = Follower(dict(model.named_buffers()) | dict(model.named_parameters()))
        remaining = {name: entry for name, entry in tensors.items() if name not in refused}
        try:
            found = run_loader(model, follower, remaining, MAX_REFUSALS - len(refused))
        except FOREIGN:  # a limit: what was refused before it stays refused
            if not refused:
                raise
            answer["mismatches"] = list(refused.values())
            return
        refused |= found
        if "" in found or len(refused) >= MAX_REFUSALS:
            answer["mismatches"] = list(refused.values())
            return
        if not found:
            break
    answer["landings"] = _landings(follower.writes, remaining)
    answer["mismatches"] = [*refused.values(), *_unsettled(model, follower.writes, remaining)]


def run_loader(
    model: nn.Module, follower: Follower, tensors: Mapping[str, tuple[str, list[int]]], limit: int
) -> dict[str, list[Any]]:
    """Run the loader once; when it refuses a tensor, run it from the next one on. At most `limit` refusals, by tensor.

    An interrupted loader may have forgotten tensors that it had put aside: only a run without refusals shows where all
    others land. An error with no tensor to blame is named "", unless a refusal came before it and may have caused it.
    """
    refused: dict[str, list[Any]] = {}
    stand_ins = _StandIns(follower, tensors)
    while len(refused) < limit:
        try:
            with follower:
                model.load_weights(stand_ins)  # type: ignore[operator] # every vLLM model has it
            follower.settle(dict(model.named_parameters()))
            break
        except FOREIGN as error:
            if limits.is_limit(error):
                if refused:
                    break
                raise
            if not stand_ins.drawn and refused:
                break
            refused[stand_ins.drawn] = [
                *("refused", stand_ins.drawn, "", "a tensor that vLLM's loader takes"),
                _words(error),
            ]
            if not stand_ins.drawn:
                break
    return refused


class _StandIns:
    """Stand-ins for tensors, once. It is no generator, which a loader that raises an error might close."""

    def __init__(self, follower: Follower, tensors: Mapping[str, tuple[str, list[int]]]) -> None:
        self._rest = iter(
            [
                (name, follower.stand_in(name, tuple(shape), _torch_dtype(dtype)))
                for name, (dtype, shape) in tensors.items()
            ]
        )
        self.drawn = ""
        """The tensor that was handed out last; empty before the first and after the last."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        self.drawn = ""
        pair = next(self._rest)
        self.drawn = pair[0]
        return pair


def _landings(writes: list[Write], tensors: Mapping[str, Any]) -> list[list[Any]]:
    places: dict[str, dict[str, None]] = {name: {} for name in tensors}
    for write in writes:
        for origin in write.origins:
            places[origin.tensor][write.place] = None
    return [[name, list(found)] for name, found in places.items()]


def _unsettled(model: nn.Module, writes: list[Write], tensors: Mapping[str, tuple[str, list[int]]]) -> list[list[Any]]:
    """Everything wrong with the tensors that vLLM accepted."""
    return [
        *parameters_not_whole(model, writes),
        *_tensors_not_whole(writes, tensors),
        *_wrong_dtypes(model, writes, tensors),
    ]


def parameters_not_whole(model: nn.Module, writes: list[Write]) -> Iterator[list[Any]]:
    """A row for each parameter that is not filled, or is filled twice."""
    from fp8pipe.oracle.landing import Region, covered, first_gap, overlapping

    regions: dict[str, list[Region]] = {}
    for write in writes:
        regions.setdefault(write.place, []).append(write.region)
    may_be_empty = _optional(model, set(regions))
    for name, parameter in model.named_parameters():
        shape, found = tuple(parameter.shape), regions.get(name, [])
        filled = covered(shape, found)
        if filled < parameter.numel() and name not in may_be_empty:
            gap = f"{filled} filled, nothing in {first_gap(shape, found)}" if filled else "nothing"
            yield ["unfilled", "", name, f"data for all {parameter.numel()} elements of {list(shape)}", gap]
        if twice := overlapping(shape, found):
            yield ["overlap", "", name, f"each element of {list(shape)} from one tensor", f"{twice} from several"]


def _optional(model: nn.Module, filled: set[str]) -> set[str]:
    """Scales of attention that have defaults: k_scale and v_scale if the checkpoint has none at all, others always."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    scales = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    return {name for name in scales if name.rpartition(".")[2] not in _KV_LEAVES or not scales & filled}


def _tensors_not_whole(writes: list[Write], tensors: Mapping[str, tuple[str, list[int]]]) -> Iterator[list[Any]]:
    from fp8pipe.oracle.landing import Region, covered

    read: dict[str, list[Region]] = {}
    places: dict[str, str] = {}
    for write in writes:
        for origin in write.origins:
            read.setdefault(origin.tensor, []).append(origin.region)
            places[origin.tensor] = write.place
    for name, (_, size) in tensors.items():
        shape = tuple(size)
        if name not in read:
            yield ["unread", name, "", "a parameter for it", "none: vLLM drops it"]
        elif (used := covered(shape, read[name])) < (total := math.prod(shape)):
            yield ["truncated", name, places[name], f"all {total} elements of {size} read", f"{used}"]


def _wrong_dtypes(
    model: nn.Module, writes: list[Write], tensors: Mapping[str, tuple[str, list[int]]]
) -> Iterator[list[Any]]:
    wanted = {name: _dtype_name(tensor.dtype) for name, tensor in (*model.named_buffers(), *model.named_parameters())}
    seen = set()
    for write in writes:
        names = {origin.tensor for origin in write.origins}
        if len(names) != 1:  # computed from several tensors, such as a dequantized weight
            continue
        (name,) = names
        found, expected = tensors[name][0], wanted[write.place]
        if found != expected and not {found, expected} <= _FLOATS and (name, write.place) not in seen:
            seen.add((name, write.place))
            yield ["dtype", name, write.place, expected, found]


# ---------------------------------------------------------------------------------------------- words


def _words(error: BaseException) -> str:
    """The error's message on one line; if it has none, the line of code that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message or f'{frame.line} (in {frame.name})'}"[:500]


def _torch_dtype(name: str) -> torch.dtype:
    return _dtypes()[name]


def _dtype_name(dtype: torch.dtype) -> str:
    return {value: name for name, value in _dtypes().items()}.get(dtype, str(dtype))


@functools.cache
def _dtypes() -> dict[str, torch.dtype]:
    import torch

    pairs = (pair.split(":") for pair in _DTYPES.split())
    return {name: getattr(torch, attribute) for name, attribute in pairs}


if __name__ == "__main__":
    main()
