"""`python -m pronghorn` is the command line."""

import sys

from pronghorn.cli import main

sys.exit(main())
