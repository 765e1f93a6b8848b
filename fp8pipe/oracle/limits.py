"""Errors of vLLM that say nothing about a checkpoint, only about how and where vLLM was asked.

In: an exception that vLLM raised while it built a model or loaded its weights. Out: whether it is such an error.
"""

from __future__ import annotations

import re
import traceback

_NO_DATA = re.compile(r"\bmeta'? (tensor|device|backend)|doesn't have storage", re.IGNORECASE)
"""torch's words where the value of a tensor without data is needed: `Cannot copy out of meta tensor; no data!`,
`Tensor.item() cannot be called on meta tensors`, `can't convert meta device type tensor to numpy`, ..."""
_PLATFORM = re.compile(r"[/\\](vllm[/\\]platforms|torch[/\\]cuda)[/\\]")
"""Code that speaks for a device: vLLM's platform (`Sparse Attention is not supported on CPU.`) and CUDA's absence."""
_PROCESSOR = re.compile(r"[/\\]vllm[/\\]transformers_utils[/\\]processor\.py$")
"""Where vLLM loads the processor of images and sounds, which it needs before it builds some models. Only config.json is
at hand when it is asked."""
_TORCH = re.compile(r"[/\\]torch[/\\]")
"""torch itself, where an operator is not made for tensors without data."""
_OPERATORS = re.compile(r"[/\\]torch[/\\]_ops\.py$")
"""Where torch looks operators up. An attribute that a module lacks is torch's error too, but the model's fault."""
_OWN_CODE = "trust_remote_code"
"""What is named where a model cannot be built without its own Python code, which is not run to check a checkpoint."""


def is_limit(error: BaseException) -> bool:
    """Whether the error arose because tensors have no data, this platform or build lacks something, or the model needs
    Python code of its own or a processor."""
    if _OWN_CODE in str(error):
        return True
    if isinstance(error, NotImplementedError | RuntimeError | TypeError) and _NO_DATA.search(str(error)):
        return True
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if any(map(_PROCESSOR.search, frames)):
        return True
    raised_in = frames[-1]
    absent = isinstance(error, AttributeError) and _OPERATORS.search(raised_in) is not None
    unfit = isinstance(error, NotImplementedError) and _TORCH.search(raised_in) is not None
    return absent or unfit or _PLATFORM.search(raised_in) is not None
