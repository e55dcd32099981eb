"""Runs `python -m dynamo.select_service`."""

import sys

from dynamo.services.selection.main import main

if __name__ == "__main__":
    sys.exit(main())
