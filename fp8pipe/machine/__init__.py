"""The machine that all this runs on: its devices and locks on them, child processes, memory, and a Prefect server."""
