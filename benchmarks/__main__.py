"""`make bench`: every benchmark, one after the other, its tables put on docs/."""

from benchmarks import calibrate, evaluate, gate, policies, quantize, upload, validate

quantize.main(["--page", str(quantize.PAGE)])
validate.main(["--page", str(quantize.PAGE)])
calibrate.main(["--page", str(calibrate.PAGE)])
upload.main(["--page", str(quantize.PAGE)])
gate.main([])
policies.main([])
evaluate.main(["--page", str(evaluate.PAGE)])
