"""Services and engines that end with the test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.services.engines import Engine
from tests.services.processes import Service, running


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts services: `start("dynamo.indexer", "--flag", ...)`."""
    with ExitStack() as stack:
        yield lambda module, *flags, **more: stack.enter_context(running(tmp_path, module, *flags, **more))


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """Makes engines."""
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(Engine(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()
