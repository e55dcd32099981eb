"""Which LoRA adapter does a request name?"""

from typing import Any

from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.runtime.errors import InvalidArgument


class Adapters:
    """The adapters an engine was started with, by the name clients use. Ids count from 1, in the order given."""

    def __init__(self, modules: dict[str, str], lora_config: Any) -> None:
        """`modules` maps a name to a directory; `lora_config` is vLLM's, None without `--enable-lora`.

        Raises:
            ValueError: there are adapters but LoRA is off, or more than the engine can hold on the CPU.
        """
        self._by_name: dict[str, Any] = {}
        if not modules:
            return
        if lora_config is None:
            raise ValueError("--lora-modules needs --enable-lora")
        from vllm.lora.request import LoRARequest

        self._by_name = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(modules.items(), 1)}

    def of_request(self, request: PreprocessedRequest) -> Any:
        """vLLM's `LoRARequest` for the adapter named by the routing hints or by the model's name; None for the base.

        Raises:
            InvalidArgument: the routing hints name an adapter that this worker does not serve.
        """
        name = request.routing.lora_name if request.routing else None
        if name is None:
            return self._by_name.get(request.model)
        if name not in self._by_name:
            known = ", ".join(self._by_name) or "none"
            raise InvalidArgument(f"no LoRA adapter {name!r} on this worker; it serves {known}", "lora_name")
        return self._by_name[name]

    def all(self) -> list[Any]:
        """Every adapter as vLLM's `LoRARequest`."""
        return list(self._by_name.values())
