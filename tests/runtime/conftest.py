"""What do the runtime's tests share? One etcd server, for those that do not hurt it."""

from collections.abc import Iterator

import pytest

from tests.runtime.etcd_server import EtcdServer, running


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """A server of one member. Leave it as it was found."""
    with running(EtcdServer(tmp_path_factory.mktemp("etcd"))) as (server,):
        yield server
