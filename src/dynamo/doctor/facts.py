"""What can be known of a machine? Plain data: learnt by `dynamo.doctor.ask`, judged by `dynamo.doctor.judge`."""

import msgspec


class Unknown(msgspec.Struct, frozen=True):
    """In place of a fact that could not be learnt."""

    why: str


class Processor(msgspec.Struct, frozen=True):
    """`cores` are those that this process may use, less where a control group grants less."""

    architecture: str
    cores: float


class Memory(msgspec.Struct, frozen=True):
    """Bytes this process may use: the machine's, or its control group's limit."""

    total_bytes: int


class System(msgspec.Struct, frozen=True):
    """`distribution` is like `debian 12`, `libc` like `glibc`; empty where the system does not say."""

    kernel: str
    distribution: str
    pretty_name: str
    libc: str
    libc_version: str


class Python(msgspec.Struct, frozen=True):
    """The interpreter that runs this."""

    implementation: str
    version: str


class Gpu(msgspec.Struct, frozen=True):
    """One device; `capability` is like `9.0`."""

    name: str
    capability: str
    memory_bytes: int


class Graphics(msgspec.Struct, frozen=True):
    """NVIDIA's devices as NVML lists them. `cuda` is the newest that the driver supports; empty without a driver."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: str = ""


class Distribution(msgspec.Struct, frozen=True):
    """An installed distribution that gives the package `dynamo`. `foreign`: its files are not this project's."""

    name: str
    version: str
    foreign: bool = False


class Packages(msgspec.Struct, frozen=True):
    """Distributions of this environment that give `dynamo`; none in a bare checkout."""

    distributions: tuple[Distribution, ...] = ()


class Dependencies(msgspec.Struct, frozen=True):
    """By distribution: its version, None where it is missing; and what those say that do not load."""

    versions: dict[str, str | None]
    broken: dict[str, str]


class Engine(msgspec.Struct, frozen=True):
    """An inference engine; `version` is None if it is not installed. `python` is like `3.11`."""

    name: str
    version: str | None
    python: str
    architecture: str


class Nixl(msgspec.Struct, frozen=True):
    """`build` is the module that was asked, empty where there is none; `trouble` is why it gave no answer."""

    build: str = ""
    version: str = ""
    plugins: tuple[str, ...] = ()
    rdma_devices: tuple[str, ...] = ()
    ucx_tls: str = ""
    trouble: str = ""


class SharedMemory(msgspec.Struct, frozen=True):
    """`/dev/shm`: what is free, and whether this user may write there."""

    free_bytes: int
    size_bytes: int
    writable: bool


class OpenFiles(msgspec.Struct, frozen=True):
    """Files and sockets a process may hold; up to `hard` it may allow itself."""

    soft: int
    hard: int


class Port(msgspec.Struct, frozen=True):
    """`state` is `free`, `ours` (a frontend serves there), `taken` or `forbidden`."""

    number: int
    purpose: str
    state: str


class Ports(msgspec.Struct, frozen=True):
    """Those that the programs would listen on by their variables."""

    ports: tuple[Port, ...]


class Clock(msgspec.Struct, frozen=True):
    """`date` is like `20261124`; `synchronised` as the kernel says."""

    date: str
    synchronised: bool
    error_s: float


class Answer(msgspec.Struct, frozen=True):
    """What one address answered: a version, or the trouble."""

    where: str
    version: str = ""
    trouble: str = ""


class Service(msgspec.Struct, frozen=True):
    """etcd or NATS. No answers and no trouble: it is not used. `trouble` is what is wrong with the settings."""

    answers: tuple[Answer, ...] = ()
    trouble: str = ""
    notes: tuple[str, ...] = ()


class Kubernetes(msgspec.Struct, frozen=True):
    """`answer` is None where nobody would be asked, or `trouble` is wrong with the settings; `discovery` is the backend
    that programs would choose here."""

    answer: Answer | None
    discovery: str
    trouble: str = ""


class Model(msgspec.Struct, frozen=True):
    """`state` is a row's name in the matrix: what was found of the model `name`, and `detail` in words."""

    name: str
    state: str
    detail: str = ""


class Workers(msgspec.Struct, frozen=True):
    """Instances in discovery; `silent` names those that do not answer, and why."""

    discovery: str
    answering: int
    silent: tuple[str, ...] = ()
