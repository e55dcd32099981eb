"""What do the runtime's tests share? One etcd server, for those that do not hurt it."""

from collections.abc import Iterator

import pytest

from tests.runtime.etcd_server import EtcdServer, running
from tests.runtime.nats_server import NatsServer, nats_running


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """A server of one member. Leave it as it was found."""
    with running(EtcdServer(tmp_path_factory.mktemp("etcd"))) as (server,):
        yield server


@pytest.fixture(scope="session")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A NATS server with JetStream. Leave it as it was found; names of namespaces are yours to choose."""
    with nats_running(NatsServer(tmp_path_factory.mktemp("nats"))) as server:
        yield server
