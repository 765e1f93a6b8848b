"""doctor: whether the Hub is one, and where the token may publish."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fp8pipe.rehearsal import localhub
from fp8pipe.rehearsal.localhub import TokenOwner
from fp8pipe.ui import doctor


def hub_and_token(monkeypatch: pytest.MonkeyPatch, endpoint: str, token: str) -> dict[str, doctor.Diagnosis]:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", token)
    return {check.name: check for check in doctor.examine()}


def test_doctor_tells_where_the_token_may_publish(monkeypatch, tmp_path):
    tokens = {
        "write": TokenOwner("ann", ("acme",)),
        "read": TokenOwner("ann", ("acme",), "read"),
        "fine": TokenOwner("ann", ("acme", "other"), "fineGrained", {"acme": ("repo.write",)}),
    }
    with localhub.start(tmp_path / "hub", tokens=tokens) as hub:
        said = {token: hub_and_token(monkeypatch, hub.endpoint, token) for token in tokens}
    assert {checks["hub"].outcome for checks in said.values()} == {"ok"}
    assert [said[token]["token"].outcome for token in tokens] == ["ok", "warning", "ok"]
    assert said["write"]["token"].detail == "local (write) of ann, may publish in ann, acme"
    assert "may publish in no namespace: it may only read" in said["read"]["token"].detail
    assert said["fine"]["token"].detail.endswith("may publish in acme")


def test_doctor_refuses_a_login_page_that_answers_for_the_hub(monkeypatch):
    class Portal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>Welcome to the hotel</html>")

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Portal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        checks = hub_and_token(monkeypatch, f"http://127.0.0.1:{server.server_port}", "x")
        server.shutdown()
    assert checks["hub"].outcome == "failed" and "not as a Hub" in checks["hub"].detail
    assert checks["token"].outcome == "warning"
