"""Where is an endpoint in the name space, and under which keys is it found?

An endpoint is named by three parts: namespace, component, endpoint. Instances of it are told apart by a
number below 2**63. Layouts: `dyn://ns.comp.ep`, `v1/instances/{ns}/{comp}/{ep}/{iid:x}`, and on the request
plane `{iid:x}/{ns}/{comp}/{ep}`.
"""

import re
from dataclasses import dataclass

INSTANCES = "v1/instances"
MODEL_CARDS = "v1/mdc"
SCHEME = "dyn://"
NATS = "nats:"  # before the inbox of a process that is reached by way of NATS, where others have host:port

_NAME = re.compile(r"[^\s./\\%\x00-\x1f\x7f]{1,120}")  # 120: three names and an id still fit a file name when encoded


def check_name(kind: str, name: str) -> str:
    """Return `name` if it can be a namespace, component or endpoint. Raises ValueError naming the part."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{kind} {name!r} is not a name: use 1 to 120 characters without white space and none of . / \\ %"
        )
    return name


@dataclass(frozen=True, slots=True)
class EndpointAddress:
    """The three parts of an endpoint's name."""

    namespace: str
    component: str
    endpoint: str

    @classmethod
    def parse(cls, path: str) -> "EndpointAddress":
        """Read `ns.comp.ep` or `dyn://ns.comp.ep`. Raises ValueError unless there are exactly three good parts."""
        parts = path.removeprefix(SCHEME).split(".")
        if len(parts) != 3:
            raise ValueError(
                f"endpoint path {path!r} has {len(parts)} part(s): write namespace.component.endpoint, "
                f"with or without {SCHEME} before it"
            )
        namespace, component, endpoint = parts
        return cls(
            check_name("namespace", namespace),
            check_name("component", component),
            check_name("endpoint", endpoint),
        )

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component}.{self.endpoint}"

    @property
    def url(self) -> str:
        """`dyn://ns.comp.ep`."""
        return f"{SCHEME}{self}"

    @property
    def slashed(self) -> str:
        """`ns/comp/ep`, as in discovery keys."""
        return f"{self.namespace}/{self.component}/{self.endpoint}"

    def instances_prefix(self) -> str:
        """The discovery prefix of all instances of this endpoint."""
        return f"{INSTANCES}/{self.slashed}/"

    def instance_key(self, instance_id: int) -> str:
        """The discovery key of one instance."""
        return f"{INSTANCES}/{self.slashed}/{instance_id:x}"

    def card_key(self, instance_id: int) -> str:
        """The discovery key of the model card of one instance."""
        return f"{MODEL_CARDS}/{self.slashed}/{instance_id:x}"

    def cards_prefix(self) -> str:
        """The discovery prefix of the model cards of this endpoint's instances."""
        return f"{MODEL_CARDS}/{self.slashed}/"

    def wire_path(self, instance_id: int) -> str:
        """How a request names the instance it is for."""
        return f"{instance_id:x}/{self.slashed}"


def split_host_port(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def join_host_port(host: str, port: int) -> str:
    """The inverse of `split_host_port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
