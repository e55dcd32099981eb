"""Runs `python -m dynamo.echo`."""

import sys

from dynamo.echo.main import main

sys.exit(main())
