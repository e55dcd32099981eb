"""Who gets the next request."""

from collections import Counter
from dataclasses import dataclass

import pytest

from dynamo.runtime import RouterMode
from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.selection import Chooser


@dataclass
class Worker:
    name: str
    inflight: int = 0
    device_type: str = "cuda"


def chosen(mode: RouterMode, workers: list[Worker], times: int) -> Counter[str]:
    chooser = Chooser()
    return Counter(chooser.choose(mode, workers).name for _ in range(times))


def test_round_robin_is_even() -> None:
    workers = [Worker(n) for n in "abc"]
    assert chosen(RouterMode.RoundRobin, workers, 9) == {"a": 3, "b": 3, "c": 3}


def test_random_reaches_everybody() -> None:
    assert set(chosen(RouterMode.Random, [Worker(n) for n in "abc"], 200)) == {"a", "b", "c"}


def test_power_of_two_never_takes_the_busiest_of_two() -> None:
    assert set(chosen(RouterMode.PowerOfTwoChoices, [Worker("idle"), Worker("busy", 9)], 50)) == {"idle"}


def test_power_of_two_with_one_candidate() -> None:
    assert chosen(RouterMode.PowerOfTwoChoices, [Worker("only", 3)], 2) == {"only": 2}


def test_least_loaded_takes_the_least_and_turns_among_equals() -> None:
    workers = [Worker("busy", 5), Worker("a", 1), Worker("b", 1)]
    counts = chosen(RouterMode.LeastLoaded, workers, 12)
    assert set(counts) == {"a", "b"}


def test_device_aware_gives_an_accelerator_eight_times_a_cpus_share() -> None:
    workers = [Worker("gpu", device_type="cuda"), Worker("cpu", device_type="cpu")]
    chooser = Chooser()
    for _ in range(90):
        chooser.choose(RouterMode.DeviceAwareWeighted, workers).inflight += 1
    assert [w.inflight for w in workers] == [80, 10]


def test_device_aware_ratio_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_ENCODER_CUDA_TO_CPU_RATIO", "0")
    with pytest.raises(ValueError, match="DYN_ENCODER_CUDA_TO_CPU_RATIO"):
        Chooser()


@pytest.mark.parametrize("mode", [RouterMode.Direct, RouterMode.KV])
def test_modes_that_choose_elsewhere_say_so(mode: RouterMode) -> None:
    with pytest.raises(InvalidArgument, match=mode.value):
        Chooser().choose(mode, [Worker("a")])
