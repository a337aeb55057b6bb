"""``python -m vml_ldm.cli``, for launchers that start a module in every process."""

import sys

from vml_ldm.cli import main

if __name__ == "__main__":
    sys.exit(main())
