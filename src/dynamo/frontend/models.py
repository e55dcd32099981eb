"""Which models can be asked for, and who answers for each?

The registry follows the model cards in discovery: models come and go with their workers, with no restart.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from dynamo.frontend.bodies import ModelObject
from dynamo.frontend.errors import model_not_found
from dynamo.frontend.metrics import MODEL_FACTS, FrontendMetrics
from dynamo.frontend.worker_set import SetKey, WorkerSet, set_key
from dynamo.llm.model_card import CARD_PREFIX, CardKey, ModelDeploymentCard, ModelInput, ModelType
from dynamo.router.config import KvRouterConfig, LoadThresholdConfig, RouterConfig
from dynamo.router.queue_profile import effective
from dynamo.router.split_settings import check_split
from dynamo.runtime.discovery import Delete
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.errors import DiscoveryError, DynamoException, InvalidArgument, WorkerUnavailable

log = logging.getLogger(__name__)

FIRST_LOOK_S = 5.0  # for a watch to tell what is there; it takes milliseconds
FIRST_LOOK_RETRY_S = 1.0  # between two questions to a store that does not answer yet

SERVED_KINDS = (ModelType.Chat, ModelType.Completions)


class NamespaceFilter:
    """Which namespaces this frontend serves [R18]: all, one, or `prefix` and `prefix-*`; the prefix wins."""

    def __init__(self, namespace: str | None = None, prefix: str | None = None) -> None:
        self._namespace = namespace
        self._prefix = prefix

    def __contains__(self, namespace: str) -> bool:
        if self._prefix:
            return namespace == self._prefix or namespace.startswith(f"{self._prefix}-")
        return not self._namespace or namespace == self._namespace


class Model:
    """One name that requests may ask for, with every set of workers that answers to it.

    What is asked for at every request is computed when something changes (`refresh`), not at every request.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.created = int(time.time())
        self.sets: dict[SetKey, WorkerSet] = {}
        self._ready: dict[ModelType, list[WorkerSet]] = {}

    @property
    def context_length(self) -> int | None:
        """The longest context that every set takes, in tokens."""
        return min((s.card.context_length for s in self.sets.values() if s.card.context_length), default=None)

    @property
    def ready(self) -> bool:
        """Whether any request can be answered."""
        return any(self._ready.values())

    def refresh(self) -> None:
        """Look anew at which sets can answer which kind of request."""
        for one in self.sets.values():
            one.pair(next((s for s in self.sets.values() if s.can_prefill and one.takes_over_from(s)), None))
        able = [s for s in self.sets.values() if s.serves and s.ready and not self._missing(s)]
        self._ready = {kind: [s for s in able if kind in s.card.types] for kind in SERVED_KINDS}

    def choose(self, kind: ModelType) -> WorkerSet:
        """A set that is ready: at random, weighted by its workers [F12].

        Raises:
            RequestRefused: 404, the model answers no requests of this kind.
            WorkerUnavailable: it does, but nobody is ready.
        """
        ready = self._ready.get(kind)
        if not ready:
            if not any(kind in s.card.types for s in self.sets.values()):
                raise model_not_found(self.name)
            trouble = next((s.trouble for s in self.sets.values() if s.trouble), "")
            raise WorkerUnavailable(f"model {self.name!r} has no worker that is ready{trouble and ': '}{trouble}")
        if len(ready) == 1:
            return ready[0]
        return random.choices(ready, [s.worker_count for s in ready])[0]

    def _present(self, namespace: str) -> set[str]:
        """The kinds of workers that are there in a namespace."""
        return {
            s.card.worker_type.value for s in self.sets.values() if s.key.namespace == namespace and s.worker_count > 0
        }

    def _missing(self, worker_set: WorkerSet) -> set[str]:
        """What the set needs and does not find: of its alternatives, the one that lacks least [R23]."""
        present = self._present(worker_set.key.namespace)
        lacking = [{kind.value for kind in together} - present for together in worker_set.card.needs]
        return min(lacking, key=len, default=set())

    def readiness(self) -> dict[str, Any]:
        """The body of `/v1/models/{id}/ready` [A5]."""
        namespaces: dict[str, Any] = {}
        ready = {s.key.namespace for sets in self._ready.values() for s in sets}
        for worker_set in self.sets.values():
            namespace = worker_set.key.namespace
            entry = namespaces.setdefault(
                namespace,
                {"ready": namespace in ready, "worker_types": {}, "present": [], "missing_worker_types": []},
            )
            kind = worker_set.card.worker_type.value
            needs = [[need.value for need in together] for together in worker_set.card.needs]
            of_kind = entry["worker_types"].setdefault(kind, {"workers": 0, "needs": needs})
            of_kind["workers"] += worker_set.worker_count
            entry["present"] = sorted(self._present(namespace))
            entry["missing_worker_types"] = sorted({*entry["missing_worker_types"], *self._missing(worker_set)})
        return {"model": self.name, "ready": bool(ready), "namespaces": namespaces}

    def describe(self) -> ModelObject:
        """One entry of `/v1/models` [A3]."""
        return ModelObject(self.name, "model", self.created, "nvidia", self.context_length or 0)


class Settings(msgspec.Struct, frozen=True):
    """What operators changed while the frontend ran, by model."""

    thresholds: dict[str, LoadThresholdConfig] = {}
    splits: dict[str, KvRouterConfig] = {}


class ModelRegistry:
    """All models, kept up to date by `follow`."""

    def __init__(
        self,
        runtime: DistributedRuntime,
        metrics: FrontendMetrics,
        namespaces: NamespaceFilter,
        routing: RouterConfig,
        min_workers: int = 0,
    ) -> None:
        self._runtime = runtime
        self._metrics = metrics
        self._namespaces = namespaces
        self._routing = routing
        self._min_workers = min_workers
        self._models: dict[str, Model] = {}
        self._sets: dict[SetKey, WorkerSet] = {}
        self._by_key: dict[CardKey, SetKey] = {}
        self._listeners: list[Callable[[], None]] = []
        self._any_takes_text = False
        self._thresholds: dict[str, LoadThresholdConfig] = {}
        self._splits: dict[str, KvRouterConfig] = {}
        self._split_at_start = effective(routing)
        check_split(self._split_at_start)
        self._leaving: set[asyncio.Task[None]] = set()
        self.looked = False
        """Whether all that was there when this frontend came is known. Before that, no model is unknown for sure."""

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever models or their readiness may have changed."""
        self._listeners.append(callback)

    def get(self, name: str) -> Model | None:
        """The model of this name, ready or not."""
        return self._models.get(name)

    def unknown(self, name: str) -> DynamoException:
        """Why there is no such model: there is none, or nobody has told yet which there are."""
        if self.looked:
            return model_not_found(name)
        return WorkerUnavailable("this frontend has just begun and does not know yet which models there are")

    def all(self) -> list[Model]:
        """Every model, ready or not."""
        return list(self._models.values())

    def thresholds(self, name: str) -> dict[str, Any]:
        """When a worker of this model counts as busy."""
        found = self._thresholds.get(name, self._routing.thresholds)
        return {field: getattr(found, field) for field in found.__struct_fields__}

    def set_thresholds(self, name: str, thresholds: LoadThresholdConfig) -> None:
        """From now on they are these, for workers that come later too."""
        self._thresholds[name] = thresholds
        model = self._models.get(name)
        for worker_set in model.sets.values() if model is not None else ():
            if worker_set.router is not None:
                worker_set.router.thresholds = thresholds

    def split(self, name: str) -> KvRouterConfig:
        """The settings that say which prompts of this model go to prefill workers."""
        return self._splits.get(name, self._split_at_start)

    def set_split(self, name: str, config: KvRouterConfig) -> None:
        """From now on they are these, for workers that come later too."""
        self._splits[name] = config
        model = self._models.get(name)
        for worker_set in model.sets.values() if model is not None else ():
            worker_set.set_split(config)

    @property
    def settings(self) -> Settings:
        """All that `set_thresholds` and `set_split` were given."""
        return Settings(self._thresholds, self._splits)

    def adopt(self, settings: Settings) -> None:
        """Set what was set at another process."""
        for name, thresholds in settings.thresholds.items():
            self.set_thresholds(name, thresholds)
        for name, config in settings.splits.items():
            self.set_split(name, config)

    def ready(self) -> list[Model]:
        """The models that can answer, in order of appearance."""
        return [model for model in self._models.values() if model.ready]

    @property
    def any_takes_text(self) -> bool:
        """Whether some model's workers read requests themselves, so that bodies must be looked at before decoding."""
        return self._any_takes_text

    def sets(self) -> Iterator[WorkerSet]:
        """Every set of workers."""
        return iter(self._sets.values())

    async def follow(self) -> None:
        """Follow discovery for ever."""
        changes = self._runtime.discovery.watch(CARD_PREFIX)
        unseen = await self._first_look()
        if not unseen:
            self._have_looked()
        else:  # bounded: a key may have gone between the look and the watch, of which nobody tells then
            asyncio.get_running_loop().call_later(FIRST_LOOK_S, self._have_looked)
        async for change in changes:
            try:
                key = CardKey.parse(change.key)
                if isinstance(change, Delete):
                    self._delete(key)
                elif key.namespace in self._namespaces:
                    self._put(key, ModelDeploymentCard.from_json(change.value))
            except InvalidArgument as e:
                log.warning("ignoring the model card %s: %s", change.key, e)
            if not self.looked:
                unseen.discard(change.key)
                if not unseen:
                    self._have_looked()

    def _have_looked(self) -> None:
        self.looked = True
        self._tell()

    async def settled(self, timeout_s: float) -> bool:
        """Wait until each model that was there when this frontend came can be used, or was tried in vain."""
        changed = asyncio.Event()
        self.on_change(changed.set)
        try:
            async with asyncio.timeout(timeout_s):
                while not self.looked or not all(s.ready or s.can_prefill or s.trouble for s in self._sets.values()):
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            return False
        finally:
            self._listeners.remove(changed.set)
        return True

    async def _first_look(self) -> set[str]:
        """The keys of all cards that are there now, once discovery can say."""
        while True:
            try:
                return set(await self._runtime.discovery.get_prefix(CARD_PREFIX))
            except DiscoveryError as e:
                log.warning("which models there are is not known yet, trying on: %s", e)
                await asyncio.sleep(FIRST_LOOK_RETRY_S)

    def close(self) -> None:
        """Stop all work on models."""
        for worker_set in self._sets.values():
            worker_set.close()

    async def closed(self) -> None:
        """Wait until all that `close` began is done."""
        for worker_set in self._sets.values():
            await worker_set.closed()
        await asyncio.gather(*self._leaving, return_exceptions=True)

    def _put(self, key: CardKey, card: ModelDeploymentCard) -> None:
        if card.model_input is ModelInput.Tensor:
            log.warning("model card %s: %r takes tensors, which this version does not send", key, card.display_name)
            return
        of = set_key(key, card)
        before = self._by_key.get(key)
        if before is not None and before != of:
            self._delete(key)  # the worker now serves another model
        self._by_key[key] = of
        worker_set = self._sets.get(of)
        if worker_set is None:
            worker_set = self._add_set(of, card)
        worker_set.put(key.instance_id, card)
        self._sync_names(worker_set)
        self._changed()

    def _add_set(self, key: SetKey, card: ModelDeploymentCard) -> WorkerSet:
        routing = msgspec.structs.replace(self._routing, **self.thresholds(card.display_name))
        worker_set = WorkerSet(
            self._runtime, key, card, routing, self._min_workers, self._changed, self._metrics.text.times
        )
        worker_set.set_split(self.split(card.display_name))
        self._sets[key] = worker_set
        log.info("model %r at %s", card.display_name, key.path)
        for decode, prefill in ((worker_set, other) for other in self._sets.values()):
            self._warn_unlike(decode, prefill)
            self._warn_unlike(prefill, decode)
        worker_set.start()
        return worker_set

    def _warn_unlike(self, decode: WorkerSet, prefill: WorkerSet) -> None:
        """Say that prompts will not be split between workers that were meant to share them."""
        if decode.is_half_of(prefill) and not decode.takes_over_from(prefill):
            log.error(
                "the prefill workers of %s compute nothing for the decode workers of %s: their cards of model %r "
                "differ in files, context length or KV block size. Start both with the same model and flags",
                prefill.key.path,
                decode.key.path,
                decode.key.model,
            )

    def _delete(self, key: CardKey) -> None:
        of = self._by_key.pop(key, None)
        worker_set = self._sets.get(of) if of is not None else None
        if of is None or worker_set is None:
            return
        worker_set.remove(key.instance_id)
        self._metrics.forget_worker(key.instance_id)
        self._sync_names(worker_set)
        if not worker_set.workers:
            worker_set.count_cache(self._metrics)
            worker_set.close()
            leaving = asyncio.get_running_loop().create_task(worker_set.closed(), name=f"close {of.model}")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            del self._sets[of]
            log.info("model %r at %s has no worker left", of.model, of.path)
            for instance_id, card in worker_set.refused.items():  # the one that was in their way is gone
                self._put(CardKey(of.namespace, of.component, of.endpoint, instance_id, key.lora_slug), card)
        self._changed()

    def _sync_names(self, worker_set: WorkerSet) -> None:
        """Let the set be found by every name that one of its workers has for the model, and by no other."""
        names = worker_set.names
        for name in names:
            self._models.setdefault(name, Model(name)).sets[worker_set.key] = worker_set
        for name, model in list(self._models.items()):
            if name not in names and model.sets.pop(worker_set.key, None) is not None and not model.sets:
                del self._models[name]
                self._metrics.model_gone(name)

    def _changed(self) -> None:
        for worker_set in self._sets.values():
            worker_set.refresh()
        self._any_takes_text = any(worker_set.takes_text for worker_set in self._sets.values())
        for model in self._models.values():
            model.refresh()
            self._metrics.model_ready.labels(model.name).value = int(model.ready)
            for worker_set in model.sets.values():
                self._note_facts(model.name, worker_set.card)
        self._tell()

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def _note_facts(self, name: str, card: ModelDeploymentCard) -> None:
        for fact in MODEL_FACTS:
            value = getattr(card, fact, None)
            if value is None:
                value = getattr(card.runtime_config, fact, None)
            self._metrics.model_facts[fact].labels(name).value = value or 0
