"""Rehearsing a release: a Hub on this machine, and a demo that trains a tiny model and releases it there."""
