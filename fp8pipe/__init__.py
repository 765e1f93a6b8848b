"""fp8pipe: model id in, gated and published FP8 checkpoint out.

Each stage is a plain function from records to a record; `flows/` strings them together under Prefect, this package
never imports it. The order of the rooms is the order of the data:

    source -> architecture -> plan -> calibrate -> quantize -> validate -> evaluate -> gate -> card -> publish
"""

__version__ = "0.1.0"
