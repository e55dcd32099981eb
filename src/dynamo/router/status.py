"""What does a router say when it is asked how it is?

Every feature that was asked for is listed with whether it is in effect, so that nothing is off in silence.
"""

from typing import TYPE_CHECKING, Any

from dynamo.router.types import WorkerKey

if TYPE_CHECKING:
    from dynamo.router.model_router import ModelRouter


def router_status(router: "ModelRouter") -> dict[str, Any]:
    """See `ModelRouter.status`."""
    return {
        "model": router.name,
        "policy": router.scheduler.policy.name,
        "block_size": router.block_size,
        "cache": _cache(router),
        "workers": [_worker(router, worker) for worker in router.scheduler.load.workers],
        "queue": _queue(router),
        "overload": {
            "thresholds": {
                name: getattr(router.thresholds, name)
                for name in router.thresholds.__struct_fields__
                if getattr(router.thresholds, name) is not None
            },
            "busy_workers": router.overload.busy_workers(),
            "refused": router.overload.refused,
        },
        "affinity": _affinity(router),
        "replica_sync": _sync(router),
        "requests": router.stats.requests,
        "requests_started": router.stats.requests_started,
        "active_requests": len(router.scheduler.load.bookings),
        "warnings": warnings(router),
    }


def warnings(router: "ModelRouter") -> list[str]:
    """What is not as it was asked for, in sentences."""
    found = [f"worker {worker.worker_id}, rank {worker.dp_rank}: {why}" for worker, why in router.silent.items()]
    if router.feed is not None:
        found += [
            f"worker {line['worker_id']}, rank {line['dp_rank']}: its cache is not known in full: {line['reason']}"
            for line in router.feed.status()
            if line["state"] != "synced" and WorkerKey(line["worker_id"], line["dp_rank"]) not in router.silent
        ]
    found += [
        f"worker {worker.worker_id}, rank {worker.dp_rank}: {count} load reports had numbers that cannot be"
        for worker, count in router.reports.corrected.items()
    ]
    found += [f"the policy {router.config.router_policy} has no {name}" for name in router.config.unread_settings()]
    unsized = [
        worker
        for worker, limits in zip(router.scheduler.load.workers, router.scheduler.load.limits, strict=True)
        if limits.total_blocks is None
    ]
    if unsized and router.thresholds.active_decode_blocks_threshold is not None:
        found.append(f"active_decode_blocks_threshold does not apply to {len(unsized)} workers without total_kv_blocks")
    if not router.scheduler.load.workers:
        found.append("no worker has joined")
    return found


def _cache(router: "ModelRouter") -> dict[str, Any]:
    if router.index is None:
        assert router.guess is not None
        return {"known_by": "what is sent", "ttl_s": router.guess.ttl_s, "blocks": len(router.guess)}
    return {
        "known_by": "KV events",
        "predicted_ttl_s": router.guess.ttl_s if router.guess is not None else None,
        "blocks": len(router.index),
        "silent_workers": len(router.silent),
        "sources": router.feed.status() if router.feed is not None else [],
    }


def _worker(router: "ModelRouter", worker: WorkerKey) -> dict[str, Any]:
    load = router.scheduler.load
    at = load.position[worker]
    limits, foreign = load.limits[at], load.foreign(worker)
    report, difference = router.reports.reports.get(worker), router.reports.differences.get(worker)
    return {
        **worker._asdict(),
        "active_requests": load.requests[at],
        "prefill_tokens": load.prefill_tokens[at],
        "decode_blocks": load.decode_blocks[at],
        "of_others": {name: getattr(foreign, name) for name in foreign.__struct_fields__},
        "reported": None
        if report is None
        else {
            "active_decode_blocks": report.active_decode_blocks,
            "active_prefill_tokens": report.active_prefill_tokens,
            "running_requests": report.running_requests,
            "waiting_requests": report.waiting_requests,
        },
        "reported_less_booked": None if difference is None else difference._asdict(),
        "total_blocks": limits.total_blocks,
        "max_batched_tokens": limits.max_batched_tokens,
        "taints": sorted(limits.taints),
        "suspended": worker in router.scheduler.suspended,
    }


def _queue(router: "ModelRouter") -> dict[str, Any]:
    return {
        "in_effect": router.queue.profile.queues,
        "timeout_s": router.queue.timeout_s,
        "classes": [
            {
                "name": name,
                "policy": queue.policy.queue_policy,
                "queues": queue.policy.queues,
                "pending_requests": queue.requests,
                "pending_isl_tokens": queue.isl_tokens,
                "pending_cached_tokens": queue.cached_tokens,
                "received": queue.received,
                "queued": dict(queue.queued),
                "rejected": dict(queue.rejected),
            }
            for name, queue in router.queue.classes.items()
        ],
    }


def _affinity(router: "ModelRouter") -> dict[str, Any]:
    affinity = router.affinity
    if affinity is None:
        return {"in_effect": False}
    return {
        "in_effect": True,
        "mode": affinity.mode,
        "ttl_s": affinity.ttl_s,
        "sessions": len(affinity),
        "moved": affinity.moved,
    }


def _sync(router: "ModelRouter") -> dict[str, Any]:
    sync = router.sync
    if sync is None:
        return {"in_effect": False}
    return {
        "in_effect": True,
        "router_id": sync.router_id,
        "routers": sync.routers,
        "open_elsewhere": {str(key): count for key, count in sync.book.open_elsewhere().items()},
        "applied": sync.book.applied,
        "repaired": sync.book.repaired,
        "undecodable": sync.undecodable,
    }
