"""How does a stream of tokens become one JSON body?

The pieces of every choice are kept and joined at the end; the answer leaves in one system call with its headers.
"""

from typing import Any

from msgspec import UNSET

from dynamo.frontend import sse
from dynamo.frontend.answer import Answer, AnswerPlan
from dynamo.frontend.args import Limits
from dynamo.frontend.bodies import ChatChoice, ChatCompletion, ChatMessage, Completion, TextChoice
from dynamo.frontend.fold import Fold, whole_calls
from dynamo.frontend.http1 import Request
from dynamo.frontend.metrics import FrontendMetrics, RequestMeter
from dynamo.frontend.server import answer
from dynamo.llm.output import TextDelta
from dynamo.llm.protocols.engine import EngineOutput
from dynamo.runtime.errors import DynamoException


class UnaryAnswer(Answer):
    """One JSON body to one client."""

    def __init__(
        self,
        request: Request,
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
        body = self._chat_body() if self.plan.chat else self._completion_body()
        self.resolve(answer(self.request, 200, sse.json_bytes(body), headers=self.plan.headers))

    def _chat_body(self) -> ChatCompletion:
        plan = self.plan
        return ChatCompletion(
            plan.response_id,
            "chat.completion",
            plan.created,
            plan.model,
            [
                ChatChoice(number, _message(choice), choice.finish_reason, choice.logprobs)  # type: ignore[arg-type]
                for number, choice in enumerate(self._choices)
            ],
            self.usage(),
            self._nvext() if plan.extra_fields else UNSET,
        )

    def _completion_body(self) -> Completion:
        plan = self.plan
        return Completion(
            plan.response_id,
            "text_completion",
            plan.created,
            plan.model,
            [
                TextChoice(choice.text, number, choice.finish_reason, choice.logprobs)  # type: ignore[arg-type]
                for number, choice in enumerate(self._choices)
            ],
            self.usage(),
            self._nvext() if plan.extra_fields else UNSET,
        )

    def _nvext(self) -> dict[str, Any]:
        """The extension object [N9][N12]. Facts about a choice are lists where there is more than one."""
        wanted = self.plan.extra_fields
        fields: dict[str, Any] = {}
        if "worker_id" in wanted:
            fields["worker_id"] = self.worker_fields()
        if "timing" in wanted:
            fields["timing"] = self.timing()
        if "routing" in wanted:
            fields["routing"] = self.routing()
        first = self._choices[0]
        if "stop_reason" in wanted:
            reasons = [choice.stop_reason for choice in self._choices]
            fields["stop_reason"] = reasons[0] if len(reasons) == 1 else reasons
        if "completion_token_ids" in wanted:
            fields["completion_token_ids"] = first.token_ids
        fields.update({name: value for name, value in first.facts.items() if name in wanted})
        return fields


def _message(choice: Fold) -> ChatMessage:
    text = choice.text
    if not choice.tool_calls:
        return ChatMessage("assistant", text, None)
    return ChatMessage("assistant", text or None, None, whole_calls(choice.tool_calls))
