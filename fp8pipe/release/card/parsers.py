"""Which of vLLM's parsers a model's chat template calls for: of tool calls, and of reasoning.

A template shows how its model writes a tool call, and whether it thinks aloud. The names are those of vLLM's options
`--tool-call-parser` and `--reasoning-parser`; a test compares them with its registries.
"""

from __future__ import annotations

TOOL_CALLS = {
    ("<tool_call>", "<function="): "qwen3_coder",
    ("<tool_call>", "<arg_key>"): "glm45",
    ("<minimax:tool_call>",): "minimax_m2",
    ("<|tool_calls_section_begin|>",): "kimi_k2",
    ("<｜tool▁calls▁begin｜>",): "deepseek_v3",
    ("<|channel|>", "functions."): "openai",
    ("[TOOL_CALLS]",): "mistral",
    ("<|python_tag|>",): "llama3_json",
    ("<|python_start|>",): "llama4_pythonic",
    ("<seed:tool_call>",): "seed_oss",
    ("<tool_call>",): "hermes",
}
"""Marks that all stand in the template -> parser; the first that fits."""

REASONING = {
    ("<|channel|>", "analysis"): "openai_gptoss",
    ("<seed:think>",): "seed_oss",
    ("[THINK]",): "mistral",
    ("<minimax:tool_call>", "<think>"): "minimax_m2",
    ("<|tool_calls_section_begin|>", "<think>"): "kimi_k2",
    ("<arg_key>", "<think>"): "glm45",
    ("enable_thinking", "<|im_start|>", "<think>"): "qwen3",
    ("<think>",): "deepseek_r1",
}


def tool_parser(template: str) -> str | None:
    """The parser of tool calls; None if the template shows none, or one that is not known here."""
    return _first(TOOL_CALLS, template)


def reasoning_parser(template: str) -> str | None:
    """The parser of reasoning; None if the model does not think aloud."""
    return _first(REASONING, template)


def _first(table: dict[tuple[str, ...], str], template: str) -> str | None:
    return next((name for marks, name in table.items() if all(mark in template for mark in marks)), None)
