"""The machine that all this runs on: its devices, child processes, and a Prefect server."""
