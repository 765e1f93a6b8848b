"""`python -m fp8pipe.rehearsal.localhub --root DIR --port P`: serve a Hub in the foreground."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fp8pipe.errors import Fp8PipeError
from fp8pipe.rehearsal.localhub.process import local_token, serve, serve_as_child


def main() -> int:
    """Parse the arguments and serve. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fp8pipe.rehearsal.localhub", description="A Hub on loopback.")
    parser.add_argument("--root", type=Path, default=Path("hub"), help="folder that holds the state")
    parser.add_argument("--port", type=int, default=8765, help="0 for any free one")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.child:
            serve_as_child()
        else:
            token = local_token(arguments.root)
            serve(arguments.root, arguments.port, on_ready=lambda at: print(f"HF_ENDPOINT={at} HF_TOKEN={token}"))
    except Fp8PipeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
