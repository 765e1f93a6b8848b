"""Settings of hypothesis that several test modules share."""

from __future__ import annotations

from hypothesis import HealthCheck

CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
"""For examples that read or write files: no time limit, on any machine."""
