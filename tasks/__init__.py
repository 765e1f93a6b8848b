"""Policy around the library's stages: retries, concurrency, run names, artifacts. A task is one call."""
