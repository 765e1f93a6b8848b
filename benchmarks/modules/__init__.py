"""How far layers in vLLM are from the BF16 baseline, one by one, and whether the rule `modules` alarms falsely.

load    a checkpoint's weights in vLLM's model, without an engine
"""
