"""`python -m freemerge`."""

import sys

from freemerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
