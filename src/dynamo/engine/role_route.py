"""How is a worker told over HTTP to become another half of a pair? `/engine/role` of the system server.

GET /engine/role                        what the workers of this process are, and where
POST /engine/role {"role": "prefill"}   make them so; {"role": …, "worker_id": N} one of them
"""

from collections.abc import Sequence
from typing import Any

from dynamo.engine.serving import EngineWorker
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.errors import InvalidArgument

ROUTE = "role"


def serve_role_route(runtime: DistributedRuntime, workers: Sequence[EngineWorker]) -> None:
    """Serve the route for all workers of this process."""

    async def role(body: dict[str, Any]) -> dict[str, Any]:
        wanted = body.get("role")
        if wanted is not None:
            for worker in _named(workers, body.get("worker_id")):
                await worker.change_role(wanted)
        return {"status": "ok", "workers": [_describe(worker) for worker in workers]}

    runtime.register_engine_route(ROUTE, role)


def _named(workers: Sequence[EngineWorker], worker_id: object) -> list[EngineWorker]:
    if worker_id is None:
        return list(workers)
    found = [worker for worker in workers if str(worker.endpoint.instance_id) == str(worker_id)]
    if not found:
        raise InvalidArgument(f"worker_id: no worker {worker_id} in this process", "worker_id")
    return found


def _describe(worker: EngineWorker) -> dict[str, Any]:
    return {"worker_id": worker.endpoint.instance_id, "role": worker.role, "endpoint": worker.endpoint.path}
