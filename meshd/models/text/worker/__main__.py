"""Runs a text worker: `python -m meshd.models.text.worker MEMORY_BYTES`. Jobs come on standard input, results go to its output."""

import sys

from meshd.models.text.worker.serve import main

if __name__ == "__main__":
    main(int(sys.argv[1]))
