"""Runs `python -m dynamo.attach`."""

import sys

from dynamo.attach.main import main

sys.exit(main())
