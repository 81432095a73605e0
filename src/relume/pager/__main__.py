"""``python -m relume.pager``: see :mod:`relume.pager.main`."""

import logging
import os
import sys

from relume.linux import process
from relume.pager.main import main

if __name__ == "__main__":
    process.set_name("relume-pager")
    # No clean-up of threads and modules: the kernel does it, and nobody waits for Python's.
    status = main(sys.argv[1:])
    logging.shutdown()
    os._exit(status)
