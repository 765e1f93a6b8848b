"""A Hub on loopback, for rehearsal, the demo and tests: a real HTTP server for the unmodified huggingface_hub client.

    with start(Path("hub")) as hub:                    # a child process; hub.endpoint, hub.token, hub.environment()
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("org/model")
    serve(Path("hub"), port=8765)                      # in the foreground
    create_app(Path("hub"), tokens)                    # the bare application

access.py says who may do what. store.py keeps repositories, collections.py collections, discussions.py pull requests.
routes_*.py speak the Hub's protocol, and pages.py shows the Hub to people. disruptions.py breaks it for tests.
process.py runs it.
"""

from fp8pipe.rehearsal.localhub.access import TokenOwner, Tokens
from fp8pipe.rehearsal.localhub.app import create_app
from fp8pipe.rehearsal.localhub.disruptions import Disruption, Disruptions
from fp8pipe.rehearsal.localhub.process import LocalHub, local_token, serve, start

__all__ = [
    "Disruption",
    "Disruptions",
    "LocalHub",
    "TokenOwner",
    "Tokens",
    "create_app",
    "local_token",
    "serve",
    "start",
]
