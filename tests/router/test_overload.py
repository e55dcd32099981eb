"""When requests are refused, and what is believed of what workers say."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.llm.kv_events import LoadMetrics
from dynamo.router.active_load import ActiveLoad, Foreign
from dynamo.router.config import KvRouterConfig, LoadThresholdConfig
from dynamo.router.overload import Overload
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import RouteRequest, WorkerKey, WorkerLimits
from dynamo.router.worker_reports import Difference, WorkerReports
from dynamo.runtime.errors import WorkerOverloaded, WorkerUnavailable

ONE, TWO = WorkerKey(1), WorkerKey(2)


class Nothing:
    """An index in which nobody holds anything."""

    def find(self, sequence_hashes, now):
        return {}


def bench(workers=(ONE, TWO), limits=WorkerLimits(100, 1000, 64), **thresholds) -> Overload:  # noqa: B008
    scheduler = KvScheduler(16, KvRouterConfig(), Nothing())
    for worker in workers:
        scheduler.add_worker(worker, limits)
    return Overload(scheduler, LoadThresholdConfig(**thresholds))


def load(overload: Overload, worker: WorkerKey, tokens=0, blocks=0) -> None:
    overload._scheduler.load.book(f"{worker}", worker, (), tokens, 0.0, private_blocks=blocks)


def request(**more) -> RouteRequest:
    return RouteRequest(request_id="r", token_count=10, sequence_hashes=[], **more)


# --- thresholds


def test_nothing_is_refused_while_no_threshold_is_set():
    overload = bench()
    load(overload, ONE, 10**9, 10**6)
    load(overload, TWO, 10**9, 10**6)
    overload.check(request())
    assert overload.busy_workers() == []


@pytest.mark.parametrize(
    ("threshold", "just_free", "just_busy"),
    [
        ({"active_decode_blocks_threshold": 0.5}, {"blocks": 50}, {"blocks": 51}),
        ({"active_prefill_tokens_threshold": 500}, {"tokens": 500}, {"tokens": 501}),
        ({"active_prefill_tokens_threshold_frac": 2.0}, {"tokens": 2000}, {"tokens": 2001}),
        ({"active_prefill_tokens_threshold_frac": 2.0, "active_decode_blocks_threshold": 0.9}, {}, {"blocks": 91}),
    ],
)
def test_any_threshold_that_is_passed_makes_a_worker_busy(threshold, just_free, just_busy):
    overload = bench((ONE,), **threshold)
    load(overload, ONE, **just_free)
    overload.check(request())
    overload = bench((ONE,), **threshold)
    load(overload, ONE, **just_busy)
    assert overload.busy_workers() == [1]
    with pytest.raises(WorkerOverloaded, match="all 1 workers that could take the request are busy"):
        overload.check(request())
    assert overload.refused == 1


def test_one_worker_that_is_not_busy_is_enough():
    overload = bench(active_prefill_tokens_threshold=5)
    load(overload, ONE, 6)
    overload.check(request())
    load(overload, TWO, 6)
    with pytest.raises(WorkerOverloaded, match="active_prefill_tokens_threshold 5"):
        overload.check(request())


def test_a_worker_is_busy_only_if_all_its_ranks_are():
    overload = bench((WorkerKey(1, 0), WorkerKey(1, 1), TWO), active_prefill_tokens_threshold=5)
    load(overload, WorkerKey(1, 0), 6)
    load(overload, TWO, 6)
    assert overload.busy_workers() == [2]
    overload.check(request())
    load(overload, WorkerKey(1, 1), 6)
    assert sorted(overload.busy_workers()) == [1, 2]


def test_only_workers_that_a_request_may_go_to_count_for_it():
    overload = bench(active_prefill_tokens_threshold=5)
    load(overload, ONE, 6)
    with pytest.raises(WorkerOverloaded):
        overload.check(request(allowed=frozenset([ONE])))
    with pytest.raises(WorkerUnavailable):
        overload.check(request(allowed=frozenset([WorkerKey(9)])))


def test_thresholds_may_change_at_any_time():
    overload = bench((ONE,))
    load(overload, ONE, 6)
    overload.check(request())
    overload.thresholds = LoadThresholdConfig(active_prefill_tokens_threshold=5)
    with pytest.raises(WorkerOverloaded):
        overload.check(request())


def test_a_worker_that_does_not_say_how_many_blocks_it_has_is_never_busy_by_blocks(caplog):
    overload = bench((WorkerKey(77),), WorkerLimits(), active_decode_blocks_threshold=0.1)
    load(overload, WorkerKey(77), blocks=10**6)
    with caplog.at_level(logging.WARNING):
        overload.check(request())
    assert "worker 4d, rank 0 does not say how many KV blocks it has" in caplog.text


# --- reports


def reports_of(*bookings) -> WorkerReports:
    active = ActiveLoad()
    active.add_worker(ONE, WorkerLimits(100, 1000, 64))
    for i, (tokens, blocks) in enumerate(bookings):
        active.book(str(i), ONE, (), tokens, 0.0, private_blocks=blocks)
    return WorkerReports(active)


def report(blocks=0, tokens=0, running=0, waiting=0, worker=1) -> LoadMetrics:
    return LoadMetrics(worker, 0, blocks, tokens, blocks, running, waiting)


def foreign(reports: WorkerReports) -> Foreign:
    return reports._load.foreign(ONE)


def test_load_that_is_not_ours_counts_once_it_has_lasted():
    reports = reports_of((50, 10))
    for i in range(3):
        assert foreign(reports) == Foreign()
        reports.hear(report(30, 250, 3, 1), i / 10)
    assert foreign(reports) == Foreign(prefill_tokens=200, decode_blocks=20, requests=3)
    assert reports._load.prefill_tokens == [250]
    assert reports.differences[ONE] == Difference(200, 20, 3)
    reports.hear(report(10, 50, 1, 0), 0.3)
    assert foreign(reports) == Foreign()
    assert reports._load.decode_blocks == [10]


def test_a_report_that_is_behind_changes_nothing():
    reports = reports_of((500, 30), (500, 30))
    for i in range(5):
        reports.hear(report(10, 100, 1, 0), i / 10)
    assert foreign(reports) == Foreign()
    assert reports.differences[ONE] == Difference(-900, -50, -1)


def test_what_a_worker_said_is_believed_for_seconds_only():
    reports = reports_of()
    for i in range(3):
        reports.hear(report(30), float(i))
    reports.expire(6.9)
    assert foreign(reports).decode_blocks == 30
    reports.expire(7.1)
    assert foreign(reports) == Foreign()
    reports.hear(report(30), 8.0)  # what was said before the silence does not count for the one after
    assert foreign(reports) == Foreign()


@pytest.mark.parametrize(
    "lie",
    [
        report(blocks=-5),
        report(blocks=101),
        report(tokens=-1),
        report(tokens=1 << 60),
        report(running=-3),
        report(waiting=1 << 40),
    ],
)
def test_numbers_that_cannot_be_are_clamped_counted_and_told(lie, caplog):
    reports = reports_of()
    with caplog.at_level(logging.WARNING):
        for i in range(3):
            reports.hear(lie, i / 10)
    assert reports.corrected[ONE] == 3
    said = reports.reports[ONE]
    assert 0 <= said.active_decode_blocks <= 100
    assert said.active_prefill_tokens >= 0
    assert said.running_requests >= 0


def test_a_lie_is_told_in_the_log_by_worker_and_number(caplog):
    active = ActiveLoad()
    active.add_worker(WorkerKey(0xABC), WorkerLimits(100))
    with caplog.at_level(logging.WARNING):
        WorkerReports(active).hear(LoadMetrics(0xABC, 0, -7), 0.0)
    assert "worker abc, rank 0 reports a load that cannot be (active_decode_blocks=-7)" in caplog.text


@given(st.lists(st.tuples(*[st.integers(-(2**63), 2**63)] * 4), max_size=10))
def test_no_report_makes_the_load_less_than_what_is_booked(said):
    reports = reports_of((50, 10))
    for i, numbers in enumerate(said):
        reports.hear(report(*numbers), i / 10)
        assert reports._load.prefill_tokens[0] >= 50
        assert 10 <= reports._load.decode_blocks[0] <= 100
        assert reports._load.requests[0] >= 1
    reports.expire(1e9)
    assert (reports._load.prefill_tokens, reports._load.decode_blocks, reports._load.requests) == ([50], [10], [1])


def test_reports_of_workers_nobody_knows_are_counted():
    reports = reports_of()
    reports.hear(report(worker=9), 0.0)
    assert reports.unknown == 1
    assert not reports.reports


def test_a_worker_that_left_is_forgotten():
    reports = reports_of()
    for i in range(3):
        reports.hear(report(30), i / 10)
    reports._load.remove_worker(ONE)
    reports.forget(ONE)
    reports._load.add_worker(ONE)
    reports.hear(report(30), 0.4)
    assert foreign(reports) == Foreign()


def test_what_a_worker_reports_counts_for_thresholds():
    overload = bench((ONE,), active_decode_blocks_threshold=0.5)
    reports = WorkerReports(overload._scheduler.load)
    for i in range(3):
        reports.hear(report(60), i / 10)
    with pytest.raises(WorkerOverloaded):
        overload.check(request())
