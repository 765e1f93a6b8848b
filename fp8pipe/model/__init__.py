"""What a checkpoint is on disk: headers, shards, names, architecture and identity. Knows no Hub and runs no model.

headers       the one safetensors header parser; collects every fault
shards        bytes of its files: reads that notice changes, writes at planned offsets
fused         which Linears vLLM fuses into one matrix
names         what vLLM's loaders make of other names: scales, experts, weights that stay unquantized
patterns      matching layer names against the patterns of a config, in bounded time
architecture  the record of what each tensor is
fp8_source    reading a checkpoint that is FP8 already
identity      a digest of a folder that is cheap enough to take before and after every stage
untrusted     text and JSON from files that nobody vouches for, bounded in length, depth and memory
"""
