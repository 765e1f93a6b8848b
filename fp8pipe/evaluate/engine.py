"""The live engine: lm-eval's vLLM model with a meter on it, and what vLLM resolved and chose, read back from it.

Imported by the worker only, after `prepare_process`: importing vLLM takes most of an evaluation's start.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lm_eval.models import vllm_causallms
from lm_eval.models.utils import Collator
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from fp8pipe.errors import EngineFailed
from fp8pipe.evaluate import cpu_platform
from fp8pipe.files import digest_of
from fp8pipe.machine.device import class_of_capability, detect
from fp8pipe.records import EngineFacts

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

_VLLM: Any = vllm_causallms.VLLM  # Any: lm-eval's registry types every model as its abstract base

Tell = Callable[[dict[str, Any]], None]  # Any: JSON

_PATHS = ("pretrained", "tokenizer", "download_dir")


class MeteredVLLM(_VLLM):
    """lm-eval's vLLM model; tells its progress, notes which generations were cut, and can mix its batches anew.

    What it computes is lm-eval's, but for texts of tasks that name a sliding window.
    """

    def __init__(self, *, tell: Tell, **arguments: Any) -> None:  # Any: lm-eval's and vLLM's arguments
        super().__init__(**arguments)
        self.cut: set[tuple[str, int]] = set()
        """(leaf task, position among its scored documents) of generations that ended at their length limit."""
        self.windows: dict[str, Window] = {}
        """Leaf tasks whose texts are scored in overlapping windows."""
        self.doing = ""
        """What the progress that is told belongs to."""
        self.shuffle: random.Random | None = None
        """Draws the order in which prompts enter the engine; None: lm-eval's own, by length."""
        self._generated: list[tuple[list[int], bool]] = []
        generate, bar = self.model.generate, _bar_that_tells(lambda message: tell(message | {"note": self.doing}))
        self.model.generate = lambda *args, **options: generate(*args, **(options | {"use_tqdm": bar}))

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        order = list(range(len(requests)))
        if self.shuffle is not None:
            self.shuffle.shuffle(order)
        each: Any = sampling_params if not isinstance(sampling_params, list) else [sampling_params[i] for i in order]
        mixed = super()._model_generate([requests[i] for i in order], generate=generate, sampling_params=each)
        outputs = [output for _, output in sorted(zip(order, mixed, strict=True), key=lambda pair: pair[0])]
        if generate:  # not the likelihood requests: their outputs hold a dictionary per prompt token
            self._generated += [(o.prompt_token_ids, o.outputs[0].finish_reason == "length") for o in outputs]
        return outputs

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval does it; afterwards the outputs, which lm-eval sorts by length, are matched to their requests."""
        self._generated = []
        texts = super().generate_until(requests, disable_tqdm)
        contexts = [request.args[0] for request in requests]
        prompts = list(zip(contexts, self.tok_encode(contexts), strict=True))
        collator = Collator(prompts, lambda prompt: (-len(prompt[1]), prompt[0]))
        list(collator.get_batched(n=0))
        generated = collator.get_original(self._generated)
        for request, (_, tokens), (seen, was_cut) in zip(requests, prompts, generated, strict=True):
            # lm-eval cuts over-long prompts at the left: the engine saw the end of what this request holds
            assert seen == tokens[-len(seen) :], "outputs in another order than lm-eval's Collator gives"
            if was_cut:
                assert request.task_name is not None and request.doc_id is not None
                self.cut.add((request.task_name, request.doc_id))
        return texts

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval does it, in disjoint windows; overlapping ones for tasks that name a window."""
        slid = [i for i, request in enumerate(requests) if request.task_name in self.windows]
        plain = [i for i, request in enumerate(requests) if request.task_name not in self.windows]
        sums: dict[int, float] = {}
        if plain:  # lm-eval fails on none
            sums |= zip(plain, super().loglikelihood_rolling([requests[i] for i in plain], disable_tqdm), strict=True)
        sums |= zip(slid, self._slid([requests[i] for i in slid]), strict=True)
        return [sums[i] for i in range(len(requests))]

    def _slid(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each text: every token is scored once, with at least the window's context before it, as far
        as the text has it; the first follows the beginning-of-sequence token."""
        owners: list[int] = []
        windows: list[tuple[None, list[int], list[int]]] = []
        for place, request in enumerate(requests):
            window = self.windows[request.task_name or ""]
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            size = min(window.tokens, self.max_length - 2)
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, size, min(window.context, size))
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [place] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for place, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[place] += log_likelihood
        return sums


@dataclass(frozen=True, slots=True)
class Window:
    """How a long text is scored: so many tokens at a time, the first of them context alone."""

    tokens: int
    context: int


def sliding_windows(leaves: Mapping[str, Task]) -> dict[str, Window]:
    """Those leaf tasks whose metadata names a `window` and its `context`."""
    named = {leaf: task.config.metadata or {} for leaf, task in leaves.items()}
    return {leaf: Window(data["window"], data["context"]) for leaf, data in named.items() if "window" in data}


def _bar_that_tells(tell: Tell) -> type[tqdm[Any]]:
    """A progress bar for vLLM that also sends each step to the parent."""

    class Bar(tqdm):
        _quiet: ClassVar[dict[str, Any]] = {"mininterval": 10.0}

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | self._quiet))

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.desc.startswith("Processed"):
                tell({"done": self.n, "total": self.total})
            return shown

    return Bar


# ---------------------------------------------------------------------------------------------- facts


def engine_facts(lm: MeteredVLLM, arguments: dict[str, Any]) -> EngineFacts:
    """What serves this model now."""
    from vllm.platforms import current_platform

    config = lm.model.llm_engine.vllm_config
    seen = lm.model.apply_model(look_at)
    backends = {name for worker in seen for name in worker["attention"]}
    caches = {name for worker in seen for name in worker["kv_cache"]} or {str(config.cache_config.cache_dtype)}
    if len(caches) != 1:
        raise EngineFailed(f"layers have different KV cache dtypes ({', '.join(sorted(caches))}); expected one for all")
    capability = current_platform.get_device_capability()
    return EngineFacts(
        model_bytes=sum(lm.model.apply_model(weight_bytes)),
        linear_kernels=tuple(sorted({name for worker in seen for name in worker["kernels"]})),
        attention_backend=", ".join(sorted(backends)),
        kv_cache_dtype=caches.pop(),
        quantization=config.model_config.quantization,
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        max_model_len=config.model_config.max_model_len,
        arguments={key: value for key, value in arguments.items() if key not in _PATHS},
        device_class="cpu" if capability is None else class_of_capability(capability.major, capability.minor),
        device_name=detect().name if capability is None else current_platform.get_device_name(),
        plugin=cpu_platform.NAME if current_platform.is_cpu() and cpu_platform.active() else None,
    )


def look_at(model: torch.nn.Module) -> dict[str, list[str]]:
    """Runs in each worker: names of the kernels, attention backends and KV cache dtypes in use."""
    kernels: set[str] = set()
    attention: set[str] = set()
    kv_cache: set[str] = set()
    module: Any  # Any: torch types every attribute of a module as a tensor or module
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if hasattr(module, "attn_backend"):
            attention.add(module.attn_backend.get_name())
            kv_cache.add(str(module.kv_cache_dtype))
        elif method is not None and not type(method).__name__.startswith("Unquantized"):
            kernels.add(_kernel_name(method, getattr(module, "scheme", None)))
    return {"kernels": sorted(kernels), "attention": sorted(attention), "kv_cache": sorted(kv_cache)}


def weight_bytes(model: torch.nn.Module) -> int:
    """Runs in each worker: bytes of its parameters and buffers, shared ones once; on a CPU as they were loaded."""
    if isinstance(loaded := getattr(model, "loaded_bytes", None), int):
        return loaded
    tensors = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def _kernel_name(method: object, scheme: object | None) -> str:
    """The kernel object that a quantized layer holds; where there is none, its scheme or method is the kernel.

    Kernels for experts serve several schemes under one name, so that theirs is added: `TritonExperts(fp8_w8a8)`.
    """
    for holder in (scheme, method):
        for value in vars(holder).values() if holder is not None else ():
            if hasattr(value, "fused_experts"):  # vLLM's frame around every expert kernel
                experts = value.fused_experts
                return f"{type(experts).__name__}({experts.quant_config.config_name(torch.bfloat16)})"
            if "Kernel" in type(value).__name__:
                return type(value).__name__
    return type(method if scheme is None else scheme).__name__


def adds_bos(lm: MeteredVLLM) -> bool:
    """Whether prompts really begin with the beginning-of-sequence token."""
    bos = lm.tokenizer.bos_token_id
    return bos is not None and lm.tok_encode("a")[:1] == [bos]


def tokenizer_hash(lm: MeteredVLLM) -> str:
    """sha256 over vocabulary, special tokens and, for a fast tokenizer, its pipeline (merges, normalizer, ...)."""
    tokenizer: Any = lm.tokenizer  # Any: slow, fast and Mistral tokenizers share no base with these attributes
    pipeline = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest_of({"vocabulary": tokenizer.get_vocab(), "special": special, "pipeline": pipeline})
