"""``python -m simattn``: the command line."""

import sys

from simattn.cli import main

sys.exit(main())
