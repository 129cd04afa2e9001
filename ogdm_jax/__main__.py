"""python -m ogdm_jax COMMAND: the same as the console command `ogdm`."""

import sys

from ogdm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
