"""`python -m sdnet.bench.compile_check`."""

import sys

from sdnet.bench.compile_check.check import main

if __name__ == "__main__":
    sys.exit(main())
