"""What does a vLLM engine do with requests and outputs as half of a pair? Needs no vLLM."""

from collections.abc import Callable
from copy import copy
from typing import Any

import pytest

from dynamo.engine.handoff import NO_HANDOFF, Handle, Layout, Ledger
from dynamo.engine.takeover import Claims, Grant, Refusal
from dynamo.engine.transfer_metrics import DecodeMetrics, PrefillMetrics
from dynamo.llm.protocols.engine import CompletionUsage, EngineOutput, PromptTokensDetails, StopConditions, TopLogprob
from dynamo.runtime.errors import InvalidArgument, StreamIncomplete, WorkerOverloaded
from dynamo.runtime.metrics import Metrics
from dynamo.vllm.driver import EXTERNAL_TOKENS, FIRST_TOKEN, DriverRequest
from dynamo.vllm.roles import Decode, Prefill, Whole
from tests.vllm.vllm_helpers import request

PROMPT = list(range(100))
FIRST = 7
LAYOUT = Layout("nixl", "m", 16)
HANDLE = Handle("id", "i", "ns.prefill.handoff", 5, "e", LAYOUT, len(PROMPT), "d", 0.0, cached_tokens=32, kv_bytes=4000)
GRANT = Grant(HANDLE, {"do_remote_prefill": True, "remote_request_id": "9"}, 1234.5, "claim")


class Params:
    """As much of vLLM's SamplingParams as a role touches."""

    def __init__(self) -> None:
        self.extra_args: dict[str, Any] | None = None
        self.max_tokens: int | None = 10
        self.min_tokens = 2
        self.structured_outputs: Any = None

    def clone(self) -> "Params":
        return copy(self)


class Engine:
    """Remembers what a role asks of it."""

    def __init__(self) -> None:
        self.sent: list[DriverRequest] = []
        self.prefill_tokens: list[int] = []
        self.withdrawn: list[str] = []
        self.failed: dict[str, Exception] = {}
        self.extended: list[tuple[Any, float]] = []
        self.refuse: Exception | None = None

    def send(self, request: DriverRequest, prefill_tokens: int) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.sent.append(request)
        self.prefill_tokens.append(prefill_tokens)

    def withdraw(self, request_id: str) -> None:
        self.withdrawn.append(request_id)

    def fail(self, request_id: str, error: Exception) -> None:
        self.failed[request_id] = error

    def extend_read(self, params: dict[str, Any], deadline: float) -> None:
        self.extended.append((params, deadline))


class ScriptedClaim:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def done(self) -> None:
        self.calls.append("done")

    def cancel(self) -> None:
        self.calls.append("cancel")


class ScriptedClaims(Claims):
    """Claims whose answers the test gives."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = DecodeMetrics(metrics, ())
        self.on_lost = "recompute"
        self.claim = ScriptedClaim()

    def begin(
        self,
        request: Any,
        then: Callable[[Grant | Refusal], None],
        renewed: Callable[[Grant], None] | None = None,
    ) -> Any:
        self.then = then
        assert renewed is not None
        self.renewed = renewed
        return self.claim


class Taking:
    """A decode role with one request in it."""

    def __init__(
        self,
        *,
        longest: int = 0,
        params: dict[str, Any] | None = None,
        result: dict[str, Any] | None = None,
        **sections: Any,
    ) -> None:
        self.metrics = Metrics(1)
        self.claims, self.engine = ScriptedClaims(self.metrics), Engine()
        self.role = Decode(self.engine, self.claims, lambda: 1000)
        result = {"disaggregated_params": {}, "token_ids": [FIRST]} | (result or {})
        self.wanted = self.role.adapt(request(PROMPT, prefill_result=result, **sections))
        self.role.longest = longest
        self.params = Params()
        vars(self.params).update(params or {})
        self.role.submit(DriverRequest("r", PROMPT, self.params), self.wanted)

    def put(self, output: EngineOutput) -> EngineOutput | None:
        return output if self.role.on_output("r", output) else None

    def counted(self, name: str) -> float:
        lines = self.metrics.render().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"dynamo_component_{name}"))


def first_output(token: int = FIRST, *more: int, external: int | None = len(PROMPT)) -> EngineOutput:
    data = None if external is None else {EXTERNAL_TOKENS: external}
    ids = [token, *more]
    ranked = [[TopLogprob(id_, -0.1, 1)] for id_ in ids]
    return EngineOutput(ids, log_probs=[-0.1] * len(ids), top_logprobs=ranked, engine_data=data)


def last_output(token: int) -> EngineOutput:
    usage = CompletionUsage(len(PROMPT), 10, len(PROMPT) + 10, PromptTokensDetails(len(PROMPT)))
    return EngineOutput([token], finish_reason="length", completion_usage=usage)


def test_nothing_is_sent_before_the_claim_is_answered() -> None:
    taking = Taking()
    assert taking.engine.sent == []
    taking.claims.then(GRANT)
    assert [sent.token_ids for sent in taking.engine.sent] == [PROMPT]
    assert taking.engine.prefill_tokens == [0]


def test_the_engine_is_told_where_the_kv_is_until_when_and_how_to_begin() -> None:
    taking = Taking()
    taking.claims.then(GRANT)
    assert taking.params.extra_args == {
        FIRST_TOKEN: FIRST,
        "kv_transfer_params": {
            "do_remote_prefill": True,
            "remote_request_id": "9",
            "remote_blocks_expiry_time": GRANT.deadline,
        },
    }


def test_an_engine_that_has_not_read_yet_is_told_that_it_may_read_later() -> None:
    taking = Taking()
    taking.claims.then(GRANT)
    taking.claims.renewed(Grant(HANDLE, GRANT.params, 1240.0, "claim"))
    assert taking.engine.extended == [(GRANT.params, 1240.0)]


def test_the_clients_token_is_left_out_and_the_rest_is_the_engines_own() -> None:
    taking = Taking()
    taking.claims.then(GRANT)
    assert taking.put(first_output()) is None
    second = taking.put(EngineOutput([8], log_probs=[-0.2], cum_log_probs=-0.3))
    assert second is not None
    assert (second.token_ids, second.log_probs, second.cum_log_probs) == ([8], [-0.2], -0.3)


def test_of_several_first_tokens_only_the_clients_is_left_out() -> None:
    taking = Taking()
    taking.claims.then(GRANT)
    output = taking.put(first_output(FIRST, 8, 9))
    assert output is not None
    assert output.token_ids == [8, 9]
    assert output.log_probs == [-0.1, -0.1]
    assert [row[0].token_id for row in output.top_logprobs or ()] == [8, 9]


def test_an_answer_that_ends_with_the_clients_token_still_ends() -> None:
    taking = Taking()
    taking.claims.then(GRANT)
    first = first_output()
    first.finish_reason = "length"
    ended = taking.put(first)
    assert ended is not None
    assert (ended.token_ids, ended.finish_reason) == ([], "length")


def test_the_prefill_worker_may_forget_the_kv_once_the_first_token_is_here() -> None:
    taking = Taking()
    taking.claims.then(GRANT)
    assert taking.claims.claim.calls == []
    taking.put(first_output())
    assert taking.claims.claim.calls == ["done"]


def test_the_transfer_is_reported_with_the_first_output_that_is_seen() -> None:
    taking = Taking()
    taking.claims.then(GRANT)
    taking.put(first_output(external=80))
    second = taking.put(EngineOutput([8]))
    assert second is not None
    transfer = (second.engine_data or {})["kv_transfer"]
    assert (transfer["tokens"], transfer["bytes"], transfer["prefill_worker_id"]) == (80, 3200, 5)
    third = taking.put(EngineOutput([9]))
    assert third is not None
    assert third.engine_data is None
    assert taking.counted("kv_transfer_tokens_total") == 80


def test_usage_tells_what_the_prefill_worker_found_in_its_cache() -> None:
    taking = Taking()
    taking.claims.then(GRANT)
    taking.put(first_output())
    last = taking.put(last_output(9))
    assert last is not None
    assert last.completion_usage == CompletionUsage(100, 10, 110, PromptTokensDetails(32))


def test_a_refused_claim_is_recomputed_with_the_clients_token() -> None:
    taking = Taking()
    taking.claims.then(Refusal("used", "the handle was used before"))
    assert taking.params.extra_args == {FIRST_TOKEN: FIRST}
    assert taking.engine.prefill_tokens == [len(PROMPT)]
    assert taking.put(first_output(external=0)) is None
    assert taking.counted('kv_transfer_recomputes_total{reason="used"}') == 1
    assert taking.counted("kv_transfer_success_total") == 0


def test_a_refused_claim_is_a_typed_error_where_that_was_asked() -> None:
    taking = Taking()
    taking.claims.on_lost = "error"
    taking.claims.then(Refusal("used", "the handle was used before"))
    assert taking.engine.sent == []
    error = taking.engine.failed["r"]
    assert isinstance(error, StreamIncomplete)
    assert "the handle was used before" in str(error)


def test_kv_that_did_not_come_over_is_counted_as_recomputed() -> None:
    taking = Taking()
    taking.claims.then(GRANT)
    assert taking.put(first_output(external=0)) is None
    assert taking.counted('kv_transfer_recomputes_total{reason="transfer"}') == 1
    assert taking.counted("kv_transfer_success_total") == 0
    last = taking.put(last_output(9))
    assert last is not None
    assert last.completion_usage is not None
    assert last.completion_usage.prompt_tokens_details == PromptTokensDetails(len(PROMPT))


def test_another_first_token_makes_the_engine_begin_again_with_the_clients() -> None:
    taking = Taking()
    taking.claims.then(GRANT)
    assert taking.put(first_output(99)) is None
    assert taking.engine.withdrawn == ["r"]
    again = taking.engine.sent[1]
    assert again.token_ids == [*PROMPT, FIRST]
    assert (again.sampling_params.max_tokens, again.sampling_params.min_tokens) == (9, 1)
    assert again.sampling_params.extra_args is None
    output = taking.put(EngineOutput([8]))
    assert output is not None
    assert output.token_ids == [8]
    usage = CompletionUsage(101, 9, 110, PromptTokensDetails(64))
    last = taking.put(EngineOutput([9], finish_reason="length", completion_usage=usage))
    assert last is not None
    assert last.completion_usage == CompletionUsage(100, 10, 110, PromptTokensDetails(32))
    assert taking.counted("kv_first_token_mismatches_total") == 1


def test_a_constrained_answer_that_began_otherwise_fails() -> None:
    taking = Taking()
    taking.params.structured_outputs = object()
    taking.claims.then(GRANT)
    assert taking.put(first_output(99)) is None
    assert isinstance(taking.engine.failed["r"], StreamIncomplete)


def test_an_abort_before_the_answer_cancels_the_claim() -> None:
    taking = Taking()
    taking.role.forget("r")
    assert taking.claims.claim.calls == ["cancel"]


def test_an_abort_while_vllm_has_it_leaves_the_other_side_to_vllm() -> None:
    taking = Taking()
    taking.claims.then(GRANT)
    taking.role.forget("r")
    assert taking.claims.claim.calls == ["done"]


def test_what_vllm_refuses_after_the_grant_is_given_up() -> None:
    taking = Taking()
    taking.engine.refuse = WorkerOverloaded("no")
    taking.claims.then(GRANT)
    assert taking.claims.claim.calls == ["cancel"]
    assert isinstance(taking.engine.failed["r"], WorkerOverloaded)


def test_prompt_logprobs_are_the_prefill_workers() -> None:
    assert Taking(output_options={"prompt_logprobs": 2}).wanted.output_options.prompt_logprobs is None


@pytest.mark.parametrize("token", [-1, 1000])
def test_a_first_token_outside_the_vocabulary_names_the_field(token: int) -> None:
    role = Decode(Engine(), ScriptedClaims(Metrics(1)), lambda: 1000)
    wanted = request(PROMPT, prefill_result={"token_ids": [token]})
    with pytest.raises(InvalidArgument, match="is no token of this model"):
        role.submit(DriverRequest("r", PROMPT, Params()), wanted)


# --- prefill


class Filling:
    """A prefill role with one request in it. `freed` is what was given back."""

    def __init__(self, **sections: Any) -> None:
        self.freed: list[Any] = []
        self.ledger = Ledger("ns.prefill.handoff", 5, PrefillMetrics(Metrics(1), ()))
        self.ledger.free = lambda params, how: self.freed.append((params, how))
        self.engine = Engine()
        self.role = Prefill(self.engine, self.ledger, 30.0)
        self.role.layout, self.role.engine_id, self.role.bytes_per_token = LAYOUT, "e", 4
        self.wanted = self.role.adapt(request(PROMPT, **sections))
        self.params = Params()
        self.role.submit(DriverRequest("r", PROMPT, self.params), self.wanted)

    def put(self, finish_reason: Any) -> EngineOutput:
        output = EngineOutput([FIRST], finish_reason=finish_reason, disaggregated_params={"remote_request_id": "9"})
        output.completion_usage = CompletionUsage(100, 1, 101, PromptTokensDetails(32))
        assert self.role.on_output("r", output)
        return output


def test_a_prefill_makes_one_token_and_asks_vllm_to_keep_the_kv() -> None:
    filling = Filling(stop_conditions={"max_tokens": 50, "min_tokens": 5})
    assert filling.wanted.stop_conditions == StopConditions(max_tokens=1, min_tokens=1)
    assert filling.params.extra_args == {"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}


async def test_the_answer_of_a_prefill_has_a_handle() -> None:
    filling = Filling()
    handle = filling.put("length").disaggregated_params or {}
    assert (handle["num_tokens"], handle["cached_tokens"], handle["kv_bytes"]) == (100, 32, 400)
    assert filling.ledger.num_issued == 1
    filling.ledger.close()


@pytest.mark.parametrize("reason", ["eos", "stop"])
def test_a_first_token_that_is_the_last_keeps_nothing(reason: str) -> None:
    filling = Filling()
    assert filling.put(reason).disaggregated_params is None
    assert filling.freed == [({"remote_request_id": "9"}, "released")]


def test_a_request_without_handoff_keeps_nothing() -> None:
    filling = Filling(annotations=[NO_HANDOFF])
    assert filling.params.extra_args is None
    assert filling.put("length").disaggregated_params is None
    assert filling.ledger.num_issued == 0


def test_a_prefill_worker_takes_nothing_over() -> None:
    with pytest.raises(InvalidArgument, match="takes over no other's"):
        Filling(prefill_result={})


@pytest.mark.parametrize("field", ["prefill_result", "bootstrap_info"])
def test_an_engine_of_whole_requests_takes_nothing_over(field: str) -> None:
    with pytest.raises(InvalidArgument, match="computes prompts itself"):
        Whole(Engine()).adapt(request(PROMPT, **{field: {}}))
