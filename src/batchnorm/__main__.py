"""`python -m batchnorm`: the command line."""

import sys

from batchnorm.cli import main

sys.exit(main())
