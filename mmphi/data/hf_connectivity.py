"""Checks once whether the Hugging Face hub is reachable, and otherwise switches its libraries to offline mode."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from functools import cache

TIMEOUT_S = 5.0
REFUSED = (403, 407, 502, 503, 504)  # Status codes of a proxy that blocks the request.


@cache
def hub_is_reachable() -> bool:
    """Whether the hub responds.

    Its client retries for most of a minute before it reports that there is no network. If the hub does not respond
    within ``TIMEOUT_S`` seconds, the client is set to its offline mode for this process: files in the local cache are
    still found, and requests for other files fail immediately.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    question = urllib.request.Request(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, method="HEAD")
    try:
        # A new opener uses the proxy that the environment names now, if any.
        urllib.request.build_opener().open(question, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        if error.code in REFUSED:
            _go_offline()
            return False
    except OSError:
        _go_offline()
        return False
    return True


def _go_offline() -> None:
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"  # For libraries imported and processes started later.
    constants.HF_HUB_OFFLINE = True
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        datasets.config.HF_HUB_OFFLINE = True
