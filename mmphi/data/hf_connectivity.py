"""Whether the hub can be reached: asked once, and where it cannot, its libraries are told to stop trying."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from functools import cache

TIMEOUT_S = 5.0
REFUSED = (403, 407, 502, 503, 504)  # What a proxy answers that does not let one through.


@cache
def hub_is_reachable() -> bool:
    """Whether the hub answers.

    Its client tries for most of a minute before it says that there is no network. Where nobody answers within
    ``TIMEOUT_S`` seconds it is put into its own offline mode for this process: what is in the local cache is found as
    before, and what is not fails at once.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    question = urllib.request.Request(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, method="HEAD")
    try:
        # A new opener goes through the proxy that the environment names now, if it names one.
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

    os.environ["HF_HUB_OFFLINE"] = "1"  # For libraries and processes that are yet to start.
    constants.HF_HUB_OFFLINE = True
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        datasets.config.HF_HUB_OFFLINE = True
