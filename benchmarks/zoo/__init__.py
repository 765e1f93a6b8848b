"""Every decoder that transformers knows, made tiny, quantized and held against what does not share fp8pipe's knowledge.

configs     a model type -> its config class with small sizes
models      a config -> a checkpoint with random weights
rows        one architecture: quantized, validated, compared
logits      transformers on the dequantized weights against the source
hooks       static scales against plain hooks on the whole model
page        docs/architectures.md
"""
