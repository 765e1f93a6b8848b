"""The pass over the bytes: statistics of every tensor, and its difference from the source."""
