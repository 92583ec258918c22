"""The argument parser of the commands that have options of their own."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

UNKNOWN = "unrecognized arguments: "


class CommandParser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviated options and suggests the nearest one for an unknown option."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if isinstance(options.get("description"), str):  # Such as the first line of a docstring.
            options["description"] = options["description"].replace("``", "")
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with status 2.

        Raises:
            SystemExit: Always.
        """
        unknown = message.removeprefix(UNKNOWN).split()[0].partition("=")[0] if message.startswith(UNKNOWN) else ""
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=1) if unknown[:2] == "--" else []
        if unknown[:2] == "--":
            message = f"there is no option {unknown}{f'; did you mean {near[0]}?' if near else ''}"
        super().error(message)
