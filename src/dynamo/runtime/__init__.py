"""Namespaces, components and endpoints: who is there, how to ask them, how to answer.

Everything is loaded when it is first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo.runtime.annotated import Annotated
    from dynamo.runtime.client import Client
    from dynamo.runtime.component import Component, Endpoint, Namespace
    from dynamo.runtime.context import Context
    from dynamo.runtime.distributed import DistributedRuntime
    from dynamo.runtime.handlers import PyAsyncRequestStream
    from dynamo.runtime.instances import Instance
    from dynamo.runtime.selection import RouterMode
    from dynamo.runtime.unary import UnaryClient, serve_unary_endpoint
    from dynamo.runtime.worker import dynamo_endpoint, dynamo_worker

_HOME = {
    "Annotated": "annotated",
    "Client": "client",
    "Component": "component",
    "Context": "context",
    "DistributedRuntime": "distributed",
    "Endpoint": "component",
    "Instance": "instances",
    "Namespace": "component",
    "PyAsyncRequestStream": "handlers",
    "RouterMode": "selection",
    "UnaryClient": "unary",
    "dynamo_endpoint": "worker",
    "dynamo_worker": "worker",
    "serve_unary_endpoint": "unary",
}

__all__ = [
    "Annotated",
    "Client",
    "Component",
    "Context",
    "DistributedRuntime",
    "Endpoint",
    "Instance",
    "Namespace",
    "PyAsyncRequestStream",
    "RouterMode",
    "UnaryClient",
    "dynamo_endpoint",
    "dynamo_worker",
    "serve_unary_endpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
