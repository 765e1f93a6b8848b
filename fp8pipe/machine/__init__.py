"""The machine that all this runs on: its devices, child processes, memory, and a Prefect server."""
