"""The input of one quantized Linear, as calibration sees it: its range, and some of its tokens."""

from __future__ import annotations

from torch import Tensor

from fp8pipe.calibrate.noise import Seen, TokenSample
from fp8pipe.calibrate.ranges import Observer


class WatchedInput:
    """Gathers over all samples."""

    def __init__(self, observer: Observer, sample: TokenSample) -> None:
        self.observer = observer
        self._sample = sample
        self.tokens = 0
        """Tokens that it saw."""

    def saw(self, values: Tensor) -> None:
        """values: [..., tokens, in]."""
        self.observer.update(values)
        self.tokens += values.numel() // values.shape[-1]
        self._sample.add(values)

    def seen(self) -> Seen:
        """What there is to say about it."""
        (amax,), (cover,) = self.observer.amax(), self.observer.ranges()
        return Seen(self._sample.tokens(), amax, cover, self.observer.saturation())
