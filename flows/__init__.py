"""Which tasks run, in which order, and on what condition."""
