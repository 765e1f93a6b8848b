"""The running engine: lm-eval's vLLM model, metered, and the facts that are read back from it.

Only the worker imports this, after `prepare_process`. Importing vLLM takes most of an evaluation's start-up time.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval.models import vllm_causallms
from lm_eval.models.utils import Collator
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fp8pipe.errors import ConfigError, EngineFailed
from fp8pipe.evaluate import cpu_platform, texts
from fp8pipe.evaluate.bars import reporting_bar
from fp8pipe.evaluate.likelihood import Scored, likelihoods
from fp8pipe.evaluate.worker_side import look_at, weight_bytes
from fp8pipe.files import digest_of
from fp8pipe.machine.device import class_of_capability, detect
from fp8pipe.machine.gpus import visible
from fp8pipe.machine.supervise import Send
from fp8pipe.records import EngineFacts

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

_VLLM: Any = vllm_causallms.VLLM  # Any: lm-eval's registry types every model as its abstract base

_PATHS = ("pretrained", "tokenizer", "download_dir")


class MeteredVLLM(_VLLM):
    """lm-eval's vLLM model, which reports progress, notes which generations were cut short, and can reorder prompts.

    Results are lm-eval's, except for tasks that name a sliding window.
    """

    def __init__(self, *, send: Send, templated: bool, **arguments: Any) -> None:  # Any: lm-eval's and vLLM's arguments
        """templated: prompts go through the chat template. Raises InputError, before vLLM starts, for a tokenizer or a
        template that does not work."""
        self._folder = str(arguments["pretrained"])
        send({"note": texts.TRYING})
        texts.try_out(self._folder, lambda: _tokenizer(arguments), templated=templated)
        send({"note": "starting vLLM"})
        try:
            super().__init__(**arguments)
        except ValueError as error:
            if "derived max_model_len" not in str(error):  # vLLM's own check of the context, before it loads anything
                raise
            words = next(line.strip() for line in str(error).splitlines() if "derived max_model_len" in line)
            raise ConfigError(f"{self._folder}: {words} Lower max_model_len in the suite's `engine`") from error
        self.cut: set[tuple[str, int]] = set()
        """(leaf task, position among its scored documents) of generations that reached their length limit."""
        self.windows: dict[str, Window] = {}
        """Windows of the leaf tasks whose texts are scored in overlapping ones."""
        self.doing = ""
        """What the engine is working on, for progress messages."""
        self.shuffle: random.Random | None = None
        """Draws the order in which prompts enter the engine; None: lm-eval's order, by length."""
        self._generated: list[tuple[list[int], bool]] = []
        self.note = lambda words: send({"note": words})
        """Tells the parent what the engine does."""
        self._before, self._of = 0, None
        """Requests of earlier windows, and of all windows; None outside of windows."""

        def report(done: float, total: float | None) -> None:
            send({"done": self._before + done, "total": self._of or total, "note": self.doing})

        generate, bar = self.model.generate, reporting_bar(report)
        self.model.generate = lambda *args, **options: generate(*args, **(options | {"use_tqdm": bar}))

    def tok_encode(self, string: Any, *args: Any, **options: Any) -> Any:  # Any: as untyped as lm-eval's own
        """lm-eval's own method. Raises InputError for whatever the tokenizer raises."""
        with texts.bounded(self._folder, "tokenizer", count=1 if isinstance(string, str) else len(string)):
            return super().tok_encode(string, *args, **options)

    def apply_chat_template(self, *args: Any, **options: Any) -> str:
        """lm-eval's own method. Raises InputError for whatever the template raises."""
        with texts.bounded(self._folder, "chat template"):
            return super().apply_chat_template(*args, **options)

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        order = list(range(len(requests)))
        if self.shuffle is not None:
            self.shuffle.shuffle(order)
        each: Any = sampling_params if not isinstance(sampling_params, list) else [sampling_params[i] for i in order]
        mixed = super()._model_generate([requests[i] for i in order], generate=generate, sampling_params=each)
        outputs = [output for _, output in sorted(zip(order, mixed, strict=True), key=lambda pair: pair[0])]
        self._generated += [(o.prompt_token_ids, o.outputs[0].finish_reason == "length") for o in outputs]
        return outputs

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> list[Scored]:
        """As lm-eval's own method; see likelihood.py. requests: (cache key, context, answer), both as token ids."""

        def generate(prompts: list[list[int]], sampling: Any) -> Any:
            return super(MeteredVLLM, self)._model_generate(prompts, generate=True, sampling_params=sampling)

        def note(before: int, total: int) -> None:
            self._before, self._of = before, total

        questions = [(context, answer) for _, context, answer in requests]
        try:
            return likelihoods(questions, generate, max_length=self.max_length, shuffle=self.shuffle, on_window=note)
        finally:
            self._before, self._of = 0, None

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """lm-eval's own method. Then the outputs, which lm-eval sorts by length, are matched to their requests."""
        self._generated = []
        texts = super().generate_until(requests, disable_tqdm)
        contexts = [request.args[0] for request in requests]
        prompts = list(zip(contexts, self.tok_encode(contexts), strict=True))
        collator = Collator(prompts, lambda prompt: (-len(prompt[1]), prompt[0]))
        list(collator.get_batched(n=0))
        generated = collator.get_original(self._generated)
        for request, (_, tokens), (seen, was_cut) in zip(requests, prompts, generated, strict=True):
            # lm-eval truncates over-long prompts from the left, so the engine saw the end of this request's tokens
            assert seen == tokens[-len(seen) :], "outputs are not in the order of lm-eval's Collator"
            if was_cut:
                assert request.task_name is not None and request.doc_id is not None
                self.cut.add((request.task_name, request.doc_id))
        return texts

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """lm-eval's own method, in disjoint windows; in overlapping windows for tasks that name one."""
        slid = [i for i, request in enumerate(requests) if request.task_name in self.windows]
        plain = [i for i, request in enumerate(requests) if request.task_name not in self.windows]
        sums: dict[int, float] = {}
        if plain:  # lm-eval fails on an empty list
            sums |= zip(plain, super().loglikelihood_rolling([requests[i] for i in plain], disable_tqdm), strict=True)
        sums |= zip(slid, self._sliding([requests[i] for i in slid]), strict=True)
        return [sums[i] for i in range(len(requests))]

    def _sliding(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each text in nats. Every token is scored once, after at least the window's context or all
        the text before it; the first token follows the beginning-of-sequence token."""
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


def _tokenizer(arguments: Mapping[str, Any]) -> Any:  # Any: vLLM's tokenizers share no typed base
    """The tokenizer that lm-eval will load."""
    return vllm_causallms.get_tokenizer(
        arguments.get("tokenizer") or arguments["pretrained"],
        tokenizer_mode=arguments.get("tokenizer_mode", "auto"),
        trust_remote_code=bool(arguments.get("trust_remote_code")),
    )


@dataclass(frozen=True, slots=True)
class Window:
    """How a long text is scored: `tokens` at a time, of which the first `context` are only read."""

    tokens: int
    context: int


def sliding_windows(leaves: Mapping[str, Task]) -> dict[str, Window]:
    """Windows of the leaf tasks whose metadata name a `window` and its `context`, in tokens."""
    named = {leaf: task.config.metadata or {} for leaf, task in leaves.items()}
    return {leaf: Window(data["window"], data["context"]) for leaf, data in named.items() if "window" in data}


# ---------------------------------------------------------------------------------------------- facts


def engine_facts(lm: MeteredVLLM, arguments: dict[str, Any]) -> EngineFacts:
    """Kernels, cache, dtypes, sizes and device of the running engine; `arguments` are those it was started with.

    Raises EngineFailed if the layers' KV caches differ in dtype.
    """
    from vllm.platforms import current_platform

    config = lm.model.llm_engine.vllm_config
    seen = lm.model.apply_model(look_at)
    backends = {name for worker in seen for name in worker["attention"]}
    caches = {name for worker in seen for name in worker["kv_cache"]} or {str(config.cache_config.cache_dtype)}
    if len(caches) != 1:
        raise EngineFailed(f"layers have different KV cache dtypes: {', '.join(sorted(caches))}; expected one for all")
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
        gpus=() if capability is None else tuple(gpu.uuid for gpu in visible()),
        device_name=detect().name if capability is None else current_platform.get_device_name(),
        plugin=cpu_platform.NAME if current_platform.is_cpu() and cpu_platform.active() else None,
    )


def adds_bos(lm: MeteredVLLM) -> bool:
    """Whether an encoded prompt begins with the beginning-of-sequence token."""
    bos = lm.tokenizer.bos_token_id
    return bos is not None and lm.tok_encode("a")[:1] == [bos]


def tokenizer_hash(lm: MeteredVLLM) -> str:
    """sha256 hex of vocabulary, special tokens and, for a fast tokenizer, its pipeline (merges, normalizer, ...)."""
    tokenizer: Any = lm.tokenizer  # Any: slow, fast and Mistral tokenizers share no base class with these attributes
    pipeline = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest_of({"vocabulary": tokenizer.get_vocab(), "special": special, "pipeline": pipeline})
