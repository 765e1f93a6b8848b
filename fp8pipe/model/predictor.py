"""Multi-token prediction: the layers with which an engine drafts tokens that the model then checks.

The rule: they are kept unquantized. transformers does not build them, so nothing proves which of their tensors are
Linears; they are a few percent of a model; and an error in them costs accepted drafts, never a wrong token. vLLM builds
them with the model's own quantization config (vllm/model_executor/models/*_mtp.py), so the ignore list must cover them
under the names by which those classes ask: numbered behind the decoder's layers (`model.layers.61`, also where the
files say `model.mtp_layers.0` or `model.mtp_block.0`), or below `mtp`.
"""

from __future__ import annotations

import re

from fp8pipe.model.architecture import Architecture

REASON = "multi-token prediction: only drafts, which the model checks"
"""Why a plan keeps these tensors."""

_NUMBERED = re.compile(r"^((?:.*?\.)?(?:layers|transformer\.(?:h|blocks)))\.(\d{1,7})\.")
_NAMED = re.compile(r"^((?:.*?\.)?mtp\w*)(?:\.(\d+))?\.")


def predictor_of(name: str, num_layers: int) -> str:
    """The module at the root of the predicting layers that a tensor lies in, `model.layers.61` or `mtp`; empty if it
    lies in none. To ask of tensors that transformers has no place for: others may have such names too."""
    if match := _NAMED.match(name):
        return match[1]
    match = _NUMBERED.match(name)
    return f"{match[1]}.{match[2]}" if match and int(match[2]) >= num_layers else ""


def predictors_of(architecture: Architecture) -> tuple[str, ...]:
    """Roots of the predicting layers of a model, by their names on disk; empty for a model without any."""
    unplaced = (name for name, role in architecture.tensors.items() if role.kind == "unused")
    roots = (predictor_of(name, architecture.num_layers) for name in unplaced)
    return tuple(dict.fromkeys(filter(None, roots)))


def renumbered(name: str, num_layers: int) -> str:
    """The name by which vLLM asks for what lies below `mtp_layers.0` or `mtp_block.0`; the name itself where it needs
    no other."""
    number = _number(name, num_layers)
    return name if number is None else f"model.layers.{number[0]}.{number[1]}"


def _number(name: str, num_layers: int) -> tuple[int, str] | None:
    """(vLLM's number of the layer, name within it) where the files number predicting layers from 0 on; `mtp.layers.0`
    is vLLM's own name."""
    match = _NAMED.match(name)
    if match is None or match[2] is None or len(match[2]) > 7 or match[1].rpartition(".")[2] == "mtp":
        return None
    return num_layers + int(match[2]), name[match.end() :]
