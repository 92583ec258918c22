"""``python -m mmphi``."""

import sys

from mmphi.cli import main

sys.exit(main())
