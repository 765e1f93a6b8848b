"""The demo: trains a tiny model on a task that can be scored, and releases it to the local Hub."""
