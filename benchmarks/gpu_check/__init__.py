"""One prepared run on a GPU machine with Python, torch, transformers and numba: no vLLM, no pydantic, no network."""
