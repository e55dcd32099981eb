"""Runs `python -m dynamo.indexer`."""

import sys

from dynamo.services.indexer.main import main

if __name__ == "__main__":
    sys.exit(main())
