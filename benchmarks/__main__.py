"""`make bench`: every benchmark, one after the other, its tables put on docs/benchmarks.md."""

from benchmarks import quantize

quantize.main(["--page", str(quantize.PAGE)])
