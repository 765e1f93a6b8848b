"""`make bench`: every benchmark, one after the other, its tables put on docs/."""

from benchmarks import evaluate, gate, quantize

quantize.main(["--page", str(quantize.PAGE)])
gate.main([])
evaluate.main(["--page", str(evaluate.PAGE)])
