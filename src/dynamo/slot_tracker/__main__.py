"""Runs `python -m dynamo.slot_tracker`."""

import sys

from dynamo.services.slots.main import main

if __name__ == "__main__":
    sys.exit(main())
