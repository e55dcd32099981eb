"""Are etcd, NATS, Kubernetes and the hub asked as they are to be asked, and is each answer understood?"""

import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynamo.doctor.ask import services
from dynamo.doctor.ask.model import model
from dynamo.doctor.facts import Service
from tests.doctor.web_server import answering
from tests.runtime.etcd_server import make_certificates
from tests.runtime.nats_server import NatsServer, nats_running

LIMIT_S = 10.0
ETCD = {"/version": (200, b'{"etcdserver": "3.5.1", "etcdcluster": "3.5.0"}')}


@contextmanager
def greeting(line: bytes) -> Iterator[str]:
    """A server that says one line to whoever connects; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as s:

        def greet() -> None:
            connection, _ = s.accept()
            with connection:
                connection.sendall(line)

        thread = threading.Thread(target=greet)
        thread.start()
        yield f"127.0.0.1:{s.getsockname()[1]}"
        thread.join(5)


def test_nobody_is_asked_where_no_variable_names_anybody() -> None:
    assert services.etcd(LIMIT_S, {}) == services.nats(LIMIT_S, {}) == Service()


def test_each_member_of_etcd_is_asked_its_version() -> None:
    with answering(ETCD) as one, answering({}) as other:
        found = services.etcd(LIMIT_S, {"ETCD_ENDPOINTS": f"{one},{other},http://127.0.0.1:1"})
    versions = [answer.version for answer in found.answers]
    troubles = [answer.trouble for answer in found.answers]
    assert versions == ["3.5.1", "", ""]
    assert troubles[:2] == ["", "something else answers there"]
    assert "refused" in troubles[2]


def test_a_member_that_hangs_takes_no_more_than_its_share_of_the_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, answering(ETCD) as well:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        hung, fine = services.etcd(1.0, {"ETCD_ENDPOINTS": f"{url},{well}"}).answers
    assert hung.trouble == "no answer within 0.5 s"
    assert fine.version == "3.5.1"


def test_wrong_settings_are_told_as_a_program_would_tell_them() -> None:
    assert "ETCD_ENDPOINTS" in services.etcd(LIMIT_S, {"ETCD_ENDPOINTS": "ftp://h"}).trouble
    assert "NATS_SERVER" in services.nats(LIMIT_S, {"NATS_SERVER": "http://h"}).trouble


def test_a_real_nats_server_says_its_version_and_whether_it_keeps_streams(tmp_path: Path) -> None:
    with nats_running(NatsServer(tmp_path)) as server:
        found = services.nats(LIMIT_S, {"NATS_SERVER": server.url.replace("//", "//me:secret@")})
    assert found.answers[0].version.startswith("2.")
    assert "secret" not in found.answers[0].where
    assert found.notes == ("with JetStream",)


@pytest.mark.parametrize("line", [b"220 smtp.example.org\r\n", b"INFO {]\r\n", b""])
def test_a_stranger_in_the_place_of_nats_is_told(line: bytes) -> None:
    with greeting(line) as address:
        (answer,) = services.nats(LIMIT_S, {"NATS_SERVER": address}).answers
    assert answer.trouble == "something else answers there"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
@pytest.mark.parametrize(("status", "version"), [(200, "1.33.1"), (403, "unnamed")])
def test_the_kubernetes_api_is_asked_with_the_pods_authority(
    status: int, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certificates(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    with answering({"/version": (status, b'{"gitVersion": "v1.33.1"}')}, tls) as url:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", url.rpartition(":")[2])
        assert "token" in services.kubernetes(LIMIT_S, tmp_path).trouble
        (tmp_path / "token").write_text("abc")
        shutil.copy(tmp_path / "ca.pem", tmp_path / "ca.crt")
        found = services.kubernetes(LIMIT_S, tmp_path)
        shutil.copy(tmp_path / "other.pem", tmp_path / "ca.crt")
        stranger = services.kubernetes(LIMIT_S, tmp_path)
    assert (found.discovery, found.answer and found.answer.version) == ("kubernetes", version)
    assert stranger.answer is not None
    assert "CERTIFICATE_VERIFY_FAILED" in stranger.answer.trouble


def test_outside_of_a_pod_there_is_no_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert services.kubernetes(LIMIT_S).answer is None


def test_a_directory_is_looked_into(model_dir: Path, tmp_path: Path) -> None:
    assert model("", LIMIT_S).state == "not asked"
    assert model(str(model_dir), LIMIT_S).state == "without weights"
    full = tmp_path / "full"
    shutil.copytree(model_dir, full)
    (full / "model.safetensors").touch()
    assert model(str(full), LIMIT_S).state == "complete"
    assert "config.json and a tokenizer" in model(str(tmp_path), LIMIT_S).detail
    (tmp_path / "m.gguf").touch()
    assert "GGUF" in model(str(tmp_path), LIMIT_S).detail
    assert model("/no/such/directory", LIMIT_S).state == "no model"


def test_a_model_in_the_hubs_cache_needs_no_network(tmp_path: Path) -> None:
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert model("org/m", LIMIT_S, offline).state == "not in the cache"
    snapshot = tmp_path / "hub" / "models--org--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    assert model("org/m", LIMIT_S, offline).state == "in the cache"


@pytest.mark.parametrize(
    ("status", "state"), [(200, "on the hub"), (401, "refused"), (404, "refused"), (500, "strange answer")]
)
def test_the_hub_is_asked_for_a_model(status: int, state: str, tmp_path: Path) -> None:
    with answering({"/api/models/org/m": (status, b"{}")}) as url:
        assert model("org/m", LIMIT_S, {"HF_HOME": str(tmp_path), "HF_ENDPOINT": url}).state == state


def test_a_hub_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="refused"):
        model("org/m", LIMIT_S, {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:1"})
