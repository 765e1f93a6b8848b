"""FP8 for vLLM's CPU platform, in torch: quantization (quantize), linear kernels (linear) and expert kernels (experts).

Only the plugin `fp8pipe.evaluate.cpu_platform` imports these modules, once it knows that the platform is a CPU.
"""
