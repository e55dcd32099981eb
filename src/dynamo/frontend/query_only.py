"""Where would this request go? [K53]

A request with the annotation `query_instance_id` is answered by that alone, and by its tokens: nothing is sent and
nothing counted. A gateway sends the request later, pinned to the worker, with `nvext.token_data`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dynamo.frontend import sse
from dynamo.frontend.answer import AnswerPlan
from dynamo.frontend.http1 import Request, Sent
from dynamo.frontend.remote_prefill import for_prefill
from dynamo.frontend.route import wanted_of
from dynamo.frontend.server import answer
from dynamo.frontend.worker_set import WorkerSet
from dynamo.llm.output import TextDelta
from dynamo.llm.preprocessor import Prepared
from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.router.computed_elsewhere import computed_elsewhere
from dynamo.router.model_split import ModelSplit
from dynamo.router.types import Decision, RouteRequest
from dynamo.runtime.context import Context
from dynamo.runtime.errors import InvalidArgument

ANNOTATION = "query_instance_id"


def only_asks(annotations: Sequence[str]) -> bool:
    """Whether a request wants no more than to know. Annotations may have a value behind a colon."""
    return any(each.partition(":")[0] == ANNOTATION for each in annotations)


def answer_query(
    request: Request,
    plan: AnswerPlan,
    workers: WorkerSet,
    prepared: Sequence[Prepared],
    context: Context,
    *,
    stream: bool,
) -> Sent:
    """Answer in the form of the request. Raises InvalidArgument for several prompts, WorkerUnavailable."""
    if len(prepared) != 1:
        raise InvalidArgument(f"the annotation {ANNOTATION} takes one prompt, not {len(prepared)}", "prompt")
    nvext = _where(workers, prepared[0].request, context, explain=plan.explains_routing)
    form = sse.ChunkForm(chat=plan.chat, response_id=plan.response_id, created=plan.created, model=plan.model)
    if stream:
        event = form.chunk([form.choice(0, TextDelta(""), role=True)], nvext=nvext)
        return answer(request, 200, event + sse.DONE, "text/event-stream", plan.headers)
    choice: dict[str, Any] = {"index": 0, "finish_reason": None, "logprobs": None}
    if plan.chat:
        choice["message"] = {"role": "assistant", "content": None, "refusal": None}
    else:
        choice["text"] = ""
    body = {
        "id": plan.response_id,
        "object": "chat.completion" if plan.chat else "text_completion",
        "created": plan.created,
        "model": plan.model,
        "choices": [choice],
        "nvext": nvext,
    }
    return answer(request, 200, sse.json_bytes(body), headers=plan.headers)


def _where(workers: WorkerSet, request: PreprocessedRequest, context: Context, *, explain: bool) -> dict[str, Any]:
    if workers.router is None:
        worker_id = workers.choose(request)
        return {
            "worker_id": {"prefill_worker_id": worker_id, "decode_worker_id": worker_id},
            "token_ids": request.token_ids,
        }
    wanted = wanted_of(workers.router, request, context)
    split = _computed_by(workers.split, request, context, wanted) if workers.split is not None else None
    if split is not None and split.prefill is not None and workers.split is not None and workers.prefill is not None:
        computed_elsewhere(wanted)
        wanted.journey = workers.split.journey(workers.prefill.places(split.prefill.worker.worker_id))
    decision = workers.router.query(wanted, explain=explain)
    answering = decision.worker
    computing = split.prefill.worker if split is not None and split.prefill is not None else answering
    nvext: dict[str, Any] = {
        "worker_id": {
            "prefill_worker_id": computing.worker_id,
            "prefill_dp_rank": computing.dp_rank,
            "decode_worker_id": answering.worker_id,
            "decode_dp_rank": answering.dp_rank,
        },
        "token_ids": request.token_ids,
    }
    if explain:
        nvext["routing"] = {**(decision.explanation or {}), "hit_rate": decision.hit_rate}
        if split is not None:
            nvext["routing"]["split"] = split.why
    return nvext


class _Computed(NamedTuple):
    """Who would compute a prompt, if not the worker that answers, and why."""

    prefill: Decision | None
    why: dict[str, Any]


def _computed_by(split: ModelSplit, request: PreprocessedRequest, context: Context, wanted: RouteRequest) -> _Computed:
    there = wanted_of(split.prefill, for_prefill(request), context, wanted.sequence_hashes)
    found = split.decide(wanted, there)
    return _Computed(split.prefill.query(there) if found.remote else None, split.explain(found))
