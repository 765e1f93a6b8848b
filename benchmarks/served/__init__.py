"""Tests every architecture with every recipe: tiny checkpoints of real ones, quantized and served by real vLLM.

models       the checkpoints, made with transformers from random weights
reference    the source's logits, computed by transformers in float32
cells        one architecture and one recipe: quantize, validate, ask vLLM's loader, compare logits
serve        the child process with vLLM
answers      the file in which both return logits and chosen experts
table        docs/served.md
"""
