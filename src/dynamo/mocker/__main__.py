"""Runs `python -m dynamo.mocker`."""

import sys

from dynamo.mocker.main import main

sys.exit(main())
