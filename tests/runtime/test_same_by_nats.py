"""What the request and event planes promise, they promise by way of NATS too: the very tests of TCP and ZeroMQ."""

import pytest

from tests.runtime import test_cancellation, test_events, test_leaving, test_request_plane
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

OF_EVENTS = {
    "test_a_closed_publisher_says_so",
    "test_a_payload_that_cannot_be_encoded_is_refused_and_takes_no_number",
    "test_a_slow_iterator_holds_a_bounded_number_and_misses_nothing_the_queues_can_hold",
    "test_a_subscriber_hears_every_publisher_of_its_scope",
    "test_another_endpoints_events_are_not_heard",
    "test_another_thread_may_not_publish",
    "test_events_arrive_in_order_with_payload_and_time",
    "test_events_go_straight_to_a_listener",
    "test_it_works_on_uvloop",
    "test_iteration_ends_when_the_subscriber_is_closed",
    "test_publishers_that_come_and_go_are_followed",
    "test_the_first_event_has_number_zero",
    "test_topics_do_not_mix_even_if_one_begins_like_the_other",
}
"""Tests of events that forge no socket of ZeroMQ's, nor wait for a lease to end."""

for name in OF_EVENTS:
    globals()[name] = vars(test_events)[name]

for module in (test_request_plane, test_cancellation, test_leaving):
    for name, value in vars(module).items():
        if name.startswith("test_") and name not in OF_SOCKETS | OF_NO_PLANE:
            globals()[name] = value


@pytest.fixture(autouse=True)
def by_nats(nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes made in these tests are reached by way of NATS."""
    monkeypatch.setenv("NATS_SERVER", nats.url)
    monkeypatch.setenv("DYN_REQUEST_PLANE", "nats")
    monkeypatch.setenv("DYN_EVENT_PLANE", "nats")
