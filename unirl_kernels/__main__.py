"""``python -m unirl_kernels``: see ``cli``."""

import sys

from unirl_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
