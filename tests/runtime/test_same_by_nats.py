"""What the request plane promises, it promises by way of NATS too: the very tests of the TCP plane."""

import pytest

from tests.runtime import test_cancellation, test_leaving, test_request_plane
from tests.runtime.nats_server import NatsServer

OF_SOCKETS = {
    "test_a_caller_that_does_not_confirm_costs_the_grace_and_no_more",
    "test_a_peer_that_accepts_and_says_nothing_is_given_up_at_the_connect_deadline",
    "test_a_taken_port_is_a_clear_error",
    "test_all_interfaces_advertise_an_address_that_others_reach",
    "test_an_address_nobody_listens_on_cannot_connect",
    "test_an_advertised_host_can_be_named",
    "test_garbage_records_are_ignored",
}
"""Tests of what only TCP has."""

OF_NO_PLANE = {
    "test_dynamo_endpoint_of_strings_takes_strings_as_they_are",
    "test_dynamo_endpoint_parses_dicts_and_json",
    "test_dynamo_endpoint_refuses_what_does_not_fit",
}

for module in (test_request_plane, test_cancellation, test_leaving):
    for name, value in vars(module).items():
        if name.startswith("test_") and name not in OF_SOCKETS | OF_NO_PLANE:
            globals()[name] = value


@pytest.fixture(autouse=True)
def by_nats(nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes made in these tests are reached by way of NATS."""
    monkeypatch.setenv("NATS_SERVER", nats.url)
    monkeypatch.setenv("DYN_REQUEST_PLANE", "nats")
