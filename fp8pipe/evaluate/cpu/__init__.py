"""FP8 for vLLM's CPU platform: quantization (quantize), linear kernels (linear) and expert kernels (experts), in torch.

Imported by the plugin `fp8pipe.evaluate.cpu_platform` only, once it knows that it runs on the CPU platform.
"""
