"""Names of endpoints, and what is not one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.runtime.address import EndpointAddress, join_host_port, split_host_port
from dynamo.runtime.discovery.directory import encode_name


@pytest.mark.parametrize("path", ["ns.comp.ep", "dyn://ns.comp.ep"])
def test_three_parts_with_or_without_scheme(path: str) -> None:
    assert EndpointAddress.parse(path) == EndpointAddress("ns", "comp", "ep")


@pytest.mark.parametrize("path", ["", "ns", "ns.comp", "a.b.c.d", "dyn://ns.comp", "dyn://", "..", "a..c"])
def test_other_than_three_parts_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"namespace\.component\.endpoint|is not a name"):
        EndpointAddress.parse(path)


@pytest.mark.parametrize("name", ["a/b", "a\\b", "a b", "a\nb", "a%2fb", "x" * 121, ""])
def test_a_part_that_could_be_a_path_is_refused_and_named(name: str) -> None:
    with pytest.raises(ValueError, match="component"):
        EndpointAddress.parse(f"ns.{name}.ep")


def test_keys_and_paths_follow_the_layout_peers_use() -> None:
    address = EndpointAddress("dynamo", "backend", "generate")
    assert address.instance_key(0xABC) == "v1/instances/dynamo/backend/generate/abc"
    assert address.card_key(0xABC) == "v1/mdc/dynamo/backend/generate/abc"
    assert address.wire_path(0xABC) == "abc/dynamo/backend/generate"
    assert address.url == "dyn://dynamo.backend.generate"


@given(st.text(min_size=1))
def test_no_name_becomes_a_path_in_the_store(name: str) -> None:
    try:
        encoded = encode_name(name)
    except UnicodeEncodeError:
        return  # lone surrogates are no names
    assert not set(encoded) & set("/\\.\0 _-")


def test_host_and_port_with_ipv6() -> None:
    assert split_host_port("[::1]:80") == ("::1", 80)
    assert join_host_port("::1", 80) == "[::1]:80"


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:0", "host:99999", "host:x"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        split_host_port(address)
