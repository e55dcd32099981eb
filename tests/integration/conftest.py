"""What do tests across processes share? A deployment of real processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.deployment import Deployment


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    d = Deployment(tmp_path)
    yield d
    d.stop()
