"""Child process: how vLLM's own registry resolves names of model classes.

    python vllm_classes.py REQUEST ANSWER

REQUEST: a list of names. ANSWER: {"classes": all names that vLLM lists, "found": name -> own, backend, other head,
former, plugin or none}. No model class of vLLM is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BACKEND = "TransformersForCausalLM"


def main() -> None:
    from fp8pipe.evaluate.environment import prepare_process

    prepare_process()
    from vllm.model_executor.models import ModelRegistry

    inspected: Any = lambda name: name if name in ModelRegistry.models else None  # noqa: E731
    ModelRegistry._try_inspect_model_cls = inspected
    names, path = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    found = {name: resolved(ModelRegistry, name) for name in names}
    path.write_text(json.dumps({"classes": sorted(ModelRegistry.models), "found": found}))


def resolved(registry: Any, name: str) -> str:
    config = SimpleNamespace(hf_config=None, model_impl="auto", _get_transformers_backend_cls=lambda: BACKEND)
    try:
        built, _ = registry.inspect_model_cls([name], config)
    except ValueError as error:
        words = {"was supported in vLLM until": "former", "Please install the plugin": "plugin"}
        return next((kind for part, kind in words.items() if part in str(error)), "none")
    if name in registry.models:
        return "own"
    return "backend" if built == BACKEND else "other head"


if __name__ == "__main__":
    main()
