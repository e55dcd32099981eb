"""`python -m dynamo.replay`."""

from dynamo.replay.main import main

if __name__ == "__main__":
    raise SystemExit(main())
