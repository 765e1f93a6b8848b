"""`make bench`: every benchmark, one after the other, its tables put on docs/."""

from benchmarks import gate, quantize

quantize.main(["--page", str(quantize.PAGE)])
gate.main([])
