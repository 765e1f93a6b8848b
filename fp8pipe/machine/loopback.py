"""Requests to this machine go to it, whatever proxy is configured for others."""

from __future__ import annotations

import os

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost", "::1")


def proxy_exemption() -> dict[str, str]:
    """The variables that keep HTTP clients from asking their proxy for this machine; empty if they need none."""
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") and os.environ[name] for name in os.environ):
        return {}
    exempt = [name for name in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if name]
    missing = [name for name in _NAMES if name not in exempt]
    return dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join([*exempt, *missing])) if missing else {}


def exempt_loopback() -> None:
    """Set them for this process and those that it starts."""
    os.environ.update(proxy_exemption())
