"""fp8pipe: from a model's name to a gated and published FP8 checkpoint.

Each stage is a plain function from records to a record, in this order:

    pin -> plan -> download -> calibrate -> quantize -> validate -> evaluate -> gate -> publish

`flows/` runs the stages under Prefect. Only `cli` imports it; docs/architecture.md shows the rooms.
"""

__version__ = "0.1.0"
