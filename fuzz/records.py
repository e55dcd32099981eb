"""What does a process make of the values in discovery?"""

import contextlib

from dynamo.llm.model_card import ModelDeploymentCard
from dynamo.router.event_recovery import read_source
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.cards import _runtime_data
from dynamo.runtime.discovery.etcd.messages import Ranged, WatchLine, decode
from dynamo.runtime.errors import UNDECODABLE, InvalidArgument
from dynamo.runtime.events import scope_of
from dynamo.runtime.instances import instance_record, parse_instance
from dynamo.runtime.nats.channel import channel_record, check_record
from dynamo.runtime.zmq_channel import reached_in, zmq_record

SCOPE = scope_of("ns.c.e")
SEEDS = [
    instance_record(EndpointAddress.parse("ns.c.e"), 7, "127.0.0.1:1"),
    instance_record(EndpointAddress.parse("ns.c.e"), 7, "nats:dynamo.inbox.abc"),
    zmq_record(SCOPE, "kv-events", 7, "tcp://127.0.0.1:1", b"x" * 40),
    channel_record(SCOPE, "kv-events", 7),
    b'{"publisher_id":7,"metadata":{"recovery_target":{"instance_id":7,"component":"c"}}}',
    b'{"result":{"header":{"revision":"5"},"events":[{"kv":{"key":"djE=","value":"e30=","mod_revision":"4"}}]}}',
    b'{"display_name":"m","runtime_config":{"runtime_data":{"a":1}},"files":[{"name":"x","checksum":"y","size":1}]}',
]


async def one(data: bytes) -> None:
    """Each reader takes it, or refuses it as its callers expect."""
    with contextlib.suppress(ValueError, *UNDECODABLE):
        parse_instance("v1/instances/ns/c/e/7", data, lambda _: None)
    for read in (reached_in, check_record):
        with contextlib.suppress(ValueError, *UNDECODABLE):
            read(data, 7)
    with contextlib.suppress(ValueError):
        read_source(7, data)
    with contextlib.suppress(InvalidArgument):
        ModelDeploymentCard.from_json(data)
    for kind in (Ranged, WatchLine):
        with contextlib.suppress(*UNDECODABLE):
            decode(data, kind)
    _runtime_data(data)
