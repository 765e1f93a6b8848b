"""Does it hold for any architecture? Tiny checkpoints of real ones, quantized with every recipe, served by real vLLM.

models       the checkpoints, made with transformers from random weights
reference    the source's logits, by transformers in float32
cells        one architecture x one recipe: quantize, validate, ask vLLM's loader, compare logits
serve        the child process with vLLM
answers      what those two say, as a file
table        docs/architectures.md
"""
