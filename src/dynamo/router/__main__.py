"""Runs `python -m dynamo.router`.

The program is a service and so lives above this room, whose other modules know nothing of it; only its name is here,
because it is the one that users know.
"""

import sys

from dynamo.services.router.main import main

if __name__ == "__main__":
    sys.exit(main())
