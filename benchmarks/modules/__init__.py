"""How far layers in vLLM are from the BF16 baseline, one by one, and whether the rule `modules` alarms falsely.

load    checkpoints in vLLM without an engine, and their proofs
"""
