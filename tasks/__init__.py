"""Policy around the library's stages: retries, concurrency, run names, artifacts. A task's body is one call and its artifact."""
