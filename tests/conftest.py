"""What do all tests share? Models made on the spot, and a runtime of this process alone."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dynamo.cli.demo_model import make_demo_model

if TYPE_CHECKING:
    from dynamo.runtime import DistributedRuntime

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would every program that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

for _name in [name for name in os.environ if name.startswith("DYN_")]:
    del os.environ[_name]  # what the developer has set is not what is tested


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory in Hugging Face layout without weights: tokenizer, chat template, configs."""
    return make_demo_model(tmp_path_factory.mktemp("models") / "tiny", weights=False)


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with random float32 weights; greedy output depends on every token of the prompt."""
    return make_demo_model(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
async def runtime() -> AsyncIterator["DistributedRuntime"]:
    """A runtime whose discovery is this process's memory; closed after the test."""
    from dynamo.runtime import DistributedRuntime

    drt = DistributedRuntime(discovery_backend="mem")
    yield drt
    await drt.close()
