"""Whether the hub can be reached: asked once, and where it cannot, its libraries are told to stop trying."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from functools import cache
from urllib.parse import urlparse

TIMEOUT_S = 5.0


@cache
def hub_in_reach() -> bool:
    """Whether the hub answers.

    Its client tries for most of a minute before it says that there is no network. Where nobody answers within
    ``TIMEOUT_S`` seconds it is put into its own offline mode for this process: what is in the local cache is found as
    before, and what is not fails at once.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlparse(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
    if endpoint.scheme in urllib.request.getproxies():
        return True  # Only the proxy knows.
    try:
        port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
        socket.create_connection((endpoint.hostname or "", port), timeout=TIMEOUT_S).close()
    except OSError:
        _go_offline()
        return False
    return True


def _go_offline() -> None:
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"  # For libraries and processes that are yet to start.
    constants.HF_HUB_OFFLINE = True
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        datasets.config.HF_HUB_OFFLINE = True
