"""`python -m flashdraft` is the command `flashdraft`."""

import sys

from flashdraft.cli import main

sys.exit(main())
