"""Ratios against floors and peers, each measured in one run on one machine. Never part of the tests."""
