"""Which processes serve this model, with which words and environment?

Plain functions from what the user typed to a list of `ChildSpec`: nothing is started here.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from dynamo.cli.children import ChildSpec
from dynamo.vllm import cpu

ENGINES = ("vllm", "mocker", "echo")
DEMO_NAME = "demo"
MODE = "--disaggregation-mode"
UNKNOWN_WEIGHTS = 1 << 40  # bytes: a model still on the hub counts as large
GPU_MEMORY_SHARE = 0.9  # of a GPU, split among the workers that share it; vLLM's own default is about this
NO_VLLM = """\
the engine vLLM is not installed in this environment.
  install it:           python scripts/install_vllm.py      (make install does it too)
  or say out=mocker     to serve with simulated workers, which answer with random words
  or say out=echo       to serve with workers that answer with the prompt"""


class PlanError(ValueError):
    """What was typed cannot be served; the message says what to do."""


class Model(msgspec.Struct, frozen=True):
    """What to serve: a directory or a hub id, and the name clients use."""

    path: str
    name: str
    is_demo: bool = False


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for. Sizes in tokens; `gpus` are the ids that `CUDA_VISIBLE_DEVICES` understands."""

    model: Model
    engine: str
    workers: int
    prefill_workers: int = 0
    """Beside the others, which then decode only."""
    host: str
    port: int
    http_workers: int = 1
    router_mode: str
    tensor_parallel: int | None = None
    context_length: int | None = None
    block_size: int | None = None
    engine_flags: Sequence[str] = ()
    gpus: Sequence[str] = ()
    cores: int = 1

    @property
    def all_workers(self) -> int:
        """Of both kinds."""
        return self.workers + self.prefill_workers

    @property
    def roles(self) -> list[list[str]]:
        """The flags of each worker that say which part it does."""
        if not self.prefill_workers:
            return [[]] * self.workers
        return [[MODE, "prefill"]] * self.prefill_workers + [[MODE, "decode"]] * self.workers


def find_model(word: str | None, name: str | None, cache: Path) -> Model:
    """The model that `word` names; None is the demo model, which `dynamo.cli.demo_model` makes in `cache`.

    Raises:
        PlanError: `word` looks like a path and there is no such directory.
    """
    if word is None:
        return Model(str(cache / "demo-model"), name or DEMO_NAME, is_demo=True)
    path = Path(word).expanduser()
    if path.is_dir():
        return Model(str(path.resolve()), name or path.resolve().name)
    if word.startswith((".", "/", "~")) or word.count("/") > 1:
        raise PlanError(f"model {word!r}: there is no such directory (a hub id reads OWNER/NAME)")
    return Model(word, name or word)


def choose_engine(out: str | None) -> str:
    """The engine asked for, or vLLM. Never silently another one.

    Raises:
        PlanError: vLLM is wanted and not installed.
    """
    if out is not None and out not in ENGINES:
        raise PlanError(f"out={out}: choose one of {', '.join(ENGINES)}")
    engine = out or "vllm"
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise PlanError(NO_VLLM)
    return engine


def visible_gpus(environ: Mapping[str, str] = os.environ, driver: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Ids of the NVIDIA GPUs that this process may use, without loading CUDA."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]
    return [str(i) for i in range(len(list(driver.iterdir())))] if driver.is_dir() else []


def processes(request: Request, environ: Mapping[str, str], discovery: Path) -> list[ChildSpec]:
    """The frontend and the workers. `discovery` is a directory of their own, used unless the user chose another way.

    Raises:
        PlanError: the user chose a discovery that processes cannot share.
    """
    if environ.get("DYN_DISCOVERY_BACKEND") == "mem":
        raise PlanError("DYN_DISCOVERY_BACKEND=mem is the memory of one process: unset it, or say file")
    common = _common_environment(environ, discovery)
    where = ["--http-host", request.host, "--http-port", str(request.port)]
    if request.http_workers > 1:
        where += ["--http-workers", str(request.http_workers)]
    frontend = ChildSpec(
        "frontend",
        ["-m", "dynamo.frontend", *where, "--router-mode", request.router_mode],
        common | {"DYN_SYSTEM_PORT": "-1"},  # its own port answers /health and /metrics
    )
    build = {"vllm": _vllm_workers, "mocker": _mocker_workers, "echo": _echo_workers}[request.engine]
    workers = [
        ChildSpec(worker.name, worker.argv, {**common, **_system_port(environ, i), **worker.env})
        for i, worker in enumerate(build(request, environ))
    ]
    return [frontend, *workers]


def _common_environment(environ: Mapping[str, str], discovery: Path) -> dict[str, str]:
    added: dict[str, str] = {}
    if not environ.keys() & {"DYN_DISCOVERY_BACKEND", "DYN_FILE_KV", "ETCD_ENDPOINTS"}:
        added |= {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(discovery)}
    if "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS" not in environ:
        added["DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"] = "0"  # all end together: no router is left to be told
    return added


def _system_port(environ: Mapping[str, str], index: int) -> dict[str, str]:
    """Workers of one machine cannot share a port: the first takes the one that was asked for, the next the next."""
    port = environ.get("DYN_SYSTEM_PORT", "")
    return {"DYN_SYSTEM_PORT": str(int(port) + index)} if port.isdigit() and int(port) > 0 else {}


def _vllm_workers(request: Request, environ: Mapping[str, str]) -> list[ChildSpec]:
    argv = ["-m", "dynamo.vllm", "--model", request.model.path, "--served-model-name", request.model.name]
    argv += _given("--tensor-parallel-size", request.tensor_parallel)
    argv += _given("--max-model-len", request.context_length)
    argv += _given("--block-size", request.block_size)
    argv += request.engine_flags
    if request.model.is_demo and "--enforce-eager" not in argv:
        argv.append("--enforce-eager")  # compiling takes longer than a demo lasts
    placements = _on_gpus(request) if request.gpus else _on_cores(request, environ)
    return [
        ChildSpec(_name(i, role), [*argv, *flags, *role], env)
        for i, ((flags, env), role) in enumerate(zip(placements, request.roles, strict=True))
    ]


def _name(index: int, role: Sequence[str]) -> str:
    return f"{role[-1] if role else 'worker'}-{index + 1}"


def _on_gpus(request: Request) -> list[tuple[list[str], dict[str, str]]]:
    """Give each worker as many GPUs as it spans, in turn; workers that share one split its memory."""
    each = min(request.tensor_parallel or 1, len(request.gpus))
    slots = len(request.gpus) // each
    sharing = -(-request.all_workers // slots)
    flags = []
    if sharing > 1 and not any(f.startswith("--gpu-memory-utilization") for f in request.engine_flags):
        flags = ["--gpu-memory-utilization", f"{GPU_MEMORY_SHARE / sharing:.3f}"]
    placements = []
    for i in range(request.all_workers):
        first = i % slots * each
        placements.append((flags, {"CUDA_VISIBLE_DEVICES": ",".join(request.gpus[first : first + each])}))
    return placements


def _on_cores(request: Request, environ: Mapping[str, str]) -> list[tuple[list[str], dict[str, str]]]:
    """Split the cores: each worker alone would take nearly all of them."""
    if request.all_workers == 1:
        return [([], {})]
    directory = Path(request.model.path)
    weights = cpu.weights_bytes(directory) if directory.is_dir() else UNKNOWN_WEIGHTS
    split = {s.name: s.value for s in cpu.environment(weights, request.cores, request.all_workers, environ)}
    return [([], split)] * request.all_workers


def _mocker_workers(request: Request, environ: Mapping[str, str]) -> list[ChildSpec]:
    if not request.prefill_workers:
        return [_simulated("dynamo.mocker", request)]
    prefill = msgspec.structs.replace(request, workers=request.prefill_workers)
    return [
        _simulated("dynamo.mocker", prefill, "prefill", [MODE, "prefill"]),
        _simulated("dynamo.mocker", request, "decode", [MODE, "decode"]),
    ]


def _echo_workers(request: Request, environ: Mapping[str, str]) -> list[ChildSpec]:
    if request.prefill_workers:
        raise PlanError("--prefill-workers: out=echo computes no prompts; say out=vllm or out=mocker")
    return [_simulated("dynamo.echo", request)]


def _simulated(module: str, request: Request, name: str = "worker", role: Sequence[str] = ()) -> ChildSpec:
    """Mocker and echo hold many workers in one process."""
    argv = ["-m", module, "--model-path", request.model.path, "--model-name", request.model.name]
    argv += ["--num-workers", str(request.workers)]
    argv += _given("--max-model-len", request.context_length)
    argv += _given("--block-size", request.block_size)
    if request.workers > 1 and not role:
        name += "s"
    return ChildSpec(name, [*argv, *request.engine_flags, *role])


def _given(flag: str, value: object) -> list[str]:
    return [] if value is None else [flag, str(value)]
