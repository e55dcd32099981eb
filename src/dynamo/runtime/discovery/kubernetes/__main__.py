"""What does a cluster need before discovery works there? Prints it, for `kubectl apply -n NAMESPACE -f -`."""

import sys
from pathlib import Path


def manifests() -> str:
    """The resource's definition, the role with a service account, and the service."""
    files = sorted((Path(__file__).parent / "manifests").glob("*.yaml"))
    return "---\n".join(file.read_text() for file in files)


if __name__ == "__main__":
    sys.stdout.write(manifests())
