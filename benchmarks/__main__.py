"""`make bench`: every benchmark, one after the other, its tables put on docs/."""

from benchmarks import calibrate, evaluate, gate, quantize, validate

quantize.main(["--page", str(quantize.PAGE)])
validate.main(["--page", str(quantize.PAGE)])
calibrate.main(["--page", str(calibrate.PAGE)])
gate.main([])
evaluate.main(["--page", str(evaluate.PAGE)])
