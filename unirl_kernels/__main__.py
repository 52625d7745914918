"""``python -m unirl_kernels``: see ``commands``."""

import sys

from unirl_kernels.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
