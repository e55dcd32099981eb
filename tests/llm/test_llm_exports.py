"""Which names does `dynamo.llm` offer?"""

import subprocess
import sys

import pytest

import dynamo.llm


@pytest.mark.parametrize("name", dynamo.llm.__all__)
def test_every_name_can_be_had(name: str) -> None:
    assert getattr(dynamo.llm, name) is not None


def test_names_of_the_router_are_found_there() -> None:
    from dynamo.router.kv_router import KvRouter
    from dynamo.router.publisher import KvEventPublisher

    assert dynamo.llm.KvEventPublisher is KvEventPublisher
    assert dynamo.llm.KvRouter is KvRouter
    for name in ("KvRouterConfig", "LoadThresholdConfig", "RouterConfig", "RoutingConstraints"):
        assert getattr(dynamo.llm, name).__name__ == name


def test_a_name_of_a_later_version_says_so() -> None:
    with pytest.raises(AttributeError, match=r"dynamo\.llm\.KvDcRelay is not in this version"):
        _ = dynamo.llm.KvDcRelay


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = dynamo.llm.nonsense


def test_exceptions_are_those_of_the_runtime() -> None:
    from dynamo.llm import exceptions
    from dynamo.runtime import errors

    assert exceptions.InvalidArgument is errors.InvalidArgument
    assert dynamo.llm.InvalidArgument is errors.InvalidArgument


def test_importing_the_package_loads_no_tokenizer() -> None:
    script = (
        "import sys, dynamo.llm; print([m for m in ('tokenizers', 'jinja2', 'torch', 'aiohttp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
