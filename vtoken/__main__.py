"""`python -m vtoken` is the command line."""

import sys

from vtoken.cli import main

sys.exit(main())
