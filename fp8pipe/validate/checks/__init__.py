"""The checks, one file for each letter of their ids; `registry` lists them in the order in which they run."""
