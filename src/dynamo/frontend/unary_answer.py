"""How does a stream of tokens become one JSON body?

The pieces of every choice are kept and joined at the end; the answer leaves in one system call with its headers.
"""

from typing import Any

from aiohttp import web

from dynamo.frontend import sse
from dynamo.frontend.answer import Answer, AnswerPlan
from dynamo.frontend.args import Limits
from dynamo.frontend.fold import Fold, whole_calls
from dynamo.frontend.metrics import FrontendMetrics, RequestMeter
from dynamo.frontend.server import answer
from dynamo.llm.output import TextDelta
from dynamo.llm.protocols.engine import EngineOutput
from dynamo.runtime.errors import DynamoException


class UnaryAnswer(Answer):
    """One JSON body to one client."""

    def __init__(
        self,
        request: web.BaseRequest,
        plan: AnswerPlan,
        meter: RequestMeter,
        metrics: FrontendMetrics,
        limits: Limits,
    ) -> None:
        super().__init__(request, plan, meter, metrics, limits)
        self._choices = [Fold() for _ in range(plan.choices)]

    def add(self, number: int, delta: TextDelta, output: EngineOutput) -> None:
        choice = self._choices[number]
        choice.add(delta)
        if self.plan.extra_fields:
            choice.keep(output)

    def flush(self) -> None:
        """Nothing leaves before the end."""

    def on_full(self) -> None:
        """Nothing more will be written than one answer."""

    def on_writable(self) -> None:
        """Nothing waited for it."""

    def write_error(self, error: DynamoException, body: bytes) -> None:
        self.resolve(error)  # the handler answers it as any error before an answer

    def complete(self) -> None:
        self.closed = True
        plan = self.plan
        form = _chat_choice if plan.chat else _completion_choice
        body: dict[str, Any] = {
            "id": plan.response_id,
            "choices": [form(number, choice) for number, choice in enumerate(self._choices)],
            "created": plan.created,
            "model": plan.model,
            "object": "chat.completion" if plan.chat else "text_completion",
            "usage": self.usage(),
        }
        if plan.extra_fields:
            body["nvext"] = self._nvext()
        self.resolve(answer(self.request, 200, sse.json_bytes(body), headers=plan.headers))

    def _nvext(self) -> dict[str, Any]:
        """The extension object [N9][N12]. Facts about a choice are lists where there is more than one."""
        wanted = self.plan.extra_fields
        fields: dict[str, Any] = {}
        if "worker_id" in wanted:
            fields["worker_id"] = self.worker_fields()
        if "timing" in wanted:
            fields["timing"] = self.timing()
        first = self._choices[0]
        if "stop_reason" in wanted:
            reasons = [choice.stop_reason for choice in self._choices]
            fields["stop_reason"] = reasons[0] if len(reasons) == 1 else reasons
        if "completion_token_ids" in wanted:
            fields["completion_token_ids"] = first.token_ids
        fields.update({name: value for name, value in first.facts.items() if name in wanted})
        return fields


def _chat_choice(number: int, choice: Fold) -> dict[str, Any]:
    calls = whole_calls(choice.tool_calls) if choice.tool_calls else []
    text = choice.text
    message: dict[str, Any] = {"content": None if calls and not text else text, "refusal": None, "role": "assistant"}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": number,
        "message": message,
        "finish_reason": choice.finish_reason,
        "logprobs": choice.logprobs,
    }


def _completion_choice(number: int, choice: Fold) -> dict[str, Any]:
    return {
        "text": choice.text,
        "index": number,
        "logprobs": choice.logprobs,
        "finish_reason": choice.finish_reason,
    }
