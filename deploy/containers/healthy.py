"""Is the program in this container well? A worker's system server is asked if it has one, else the frontend."""

import os
import sys
import urllib.request

LIMIT_S = 2.0


def main() -> int:
    system = os.environ.get("DYN_SYSTEM_PORT", "-1")
    port = system if int(system) > 0 else os.environ.get("DYN_HTTP_PORT", "8000")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=LIMIT_S) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as e:  # nobody listens, or the status is one of an error
        print(e)
        return 1


if __name__ == "__main__":
    sys.exit(main())
