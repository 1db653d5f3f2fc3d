"""`python -m jaxnet.cli`, which is the command `jaxnet`."""

import sys

from jaxnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
