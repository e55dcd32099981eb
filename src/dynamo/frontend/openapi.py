"""How is the service described to programs (`/openapi.json`) and to people (`/docs`)?

Schemas are made from the structs that requests are decoded into, with the ranges that are checked after decoding, and
from those that answers are encoded from.
"""

import html
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import msgspec

from dynamo.frontend.bodies import (
    BusyThreshold,
    BusyThresholds,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ConditionalDisagg,
    ConditionalDisaggs,
    ErrorBody,
    Health,
    Live,
    ModelList,
    ModelObject,
    Readiness,
    Status,
)
from dynamo.llm.protocols.chat import ChatCompletionRequest
from dynamo.llm.protocols.completions import CompletionRequest

_ANSWERS = (
    ErrorBody, ChatCompletion, ChatCompletionChunk, Completion, ModelObject, ModelList, Readiness, Health, Live,
    BusyThreshold, BusyThresholds, ConditionalDisagg, ConditionalDisaggs, Status,
)  # fmt: skip

# What is checked after decoding, so not in the structs: field -> more schema.
_RANGES: Mapping[str, dict[str, Any]] = {
    "temperature": {"minimum": 0, "maximum": 2},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 2},
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "n": {"minimum": 1, "maximum": 128},
    "top_logprobs": {"minimum": 0, "maximum": 20},
    "messages": {"minItems": 1},
    "model": {"minLength": 1},
}
_REQUIRED = {"ChatCompletionRequest": ["model", "messages"], "CompletionRequest": ["model", "prompt"]}

_ERRORS = {
    400: "The request is wrong; the message names the field",
    404: "No such model, or no such route",
    405: "Not with this method",
    408: "The body stalled",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "Overloaded, where DYN_HTTP_OVERLOAD_STATUS_CODE says so",
    500: "The server failed",
    503: "No worker, or the server is shutting down",
    504: "The worker was silent for too long",
    529: "Overloaded: every worker is full",
}


class Description(NamedTuple):
    """The description as it is served: JSON for programs, HTML for people."""

    document: bytes
    page: bytes


def describe(paths: Mapping[str, str], overload_status: int, *, admin_api: bool = True) -> Description:
    """Describe the service. `paths` are the paths of the routes by their short names (`dynamo.frontend.app.paths`)."""
    found = document(paths, overload_status)
    if not admin_api:
        for path in ("/busy_threshold", "/conditional_disagg"):
            del found["paths"][path]
    return Description(msgspec.json.encode(found), page(found))


def _schemas() -> dict[str, Any]:
    types = (ChatCompletionRequest, CompletionRequest, *_ANSWERS)
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for name, required in _REQUIRED.items():
        schema = schemas[name]
        schema["required"] = required
        for field, more in _RANGES.items():
            if field in schema["properties"]:
                schema["properties"][field] = _narrowed(schema["properties"][field], more)
    return schemas


def _narrowed(schema: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that may be null, with `more` on its other alternative."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [s if s.get("type") == "null" else {**s, **more} for s in schema["anyOf"]]}
    return {**schema, **more}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _responses(ok: str, errors: tuple[int, ...], content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"200": {"description": ok, "content": content}}
    for status in errors:
        found[str(status)] = {"description": _ERRORS[status], "content": _json("ErrorBody")}
    return found


def _inference(summary: str, request: str, answer: str, overload_status: int) -> dict[str, Any]:
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    errors = (400, 404, 405, 408, 413, 415, 500, 503, 504, overload_status)
    return {
        "post": {
            "summary": summary,
            "operationId": summary.lower().replace(" ", "_"),
            "tags": ["inference"],
            "requestBody": {"required": True, "content": _json(request)},
            "responses": _responses("The answer, or with stream: true its events", errors, _json(answer) | events),
        }
    }


def _page(summary: str, tag: str, content: dict[str, Any], errors: tuple[int, ...] = (), model: bool = False) -> Any:
    page: dict[str, Any] = {
        "summary": summary,
        "operationId": summary.lower().replace(" ", "_"),
        "tags": [tag],
        "responses": _responses("Success", (*errors, 405), content),
    }
    if model:
        page["parameters"] = [
            {
                "name": "model",
                "in": "path",
                "required": True,
                "description": "The model's id, which may hold slashes",
                "schema": {"type": "string", "minLength": 1},
            }
        ]
    return {"get": page}


def document(paths: Mapping[str, str], overload_status: int = 529) -> dict[str, Any]:
    """The OpenAPI document. See `describe`."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    overload = overload_status if overload_status in _ERRORS else 529
    health = _page("Health of the service", "system", _json("Health"))
    health["get"]["responses"]["503"] = {
        "description": "The server is starting or shutting down",
        "content": _json("Health"),
    }
    busy = _page("Get busy thresholds", "system", _json("BusyThresholds"))
    busy["post"] = {
        "summary": "Set busy thresholds",
        "operationId": "set_busy_thresholds",
        "tags": ["system"],
        "requestBody": {"required": True, "content": _json("BusyThreshold")},
        "responses": _responses("The thresholds now", (400, 404, 405, 408, 413), _json("BusyThreshold")),
    }
    split = _page("Get conditional disaggregation", "system", _json("ConditionalDisaggs"))
    split["post"] = {
        "summary": "Set conditional disaggregation",
        "operationId": "set_conditional_disaggregation",
        "tags": ["system"],
        "requestBody": {"required": True, "content": _json("ConditionalDisagg")},
        "responses": _responses("The settings now", (400, 404, 405, 408, 413), _json("ConditionalDisagg")),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Dynamo OpenAI frontend",
            "description": "An OpenAI-compatible HTTP API in front of many inference engines.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "version": version("ai-dynamo"),
        },
        "servers": [{"url": "/"}],
        "paths": {
            paths["CHAT"]: _inference("Create chat completion", "ChatCompletionRequest", "ChatCompletion", overload),
            paths["CMP"]: _inference("Create completion", "CompletionRequest", "Completion", overload),
            paths["MODELS"]: _page("List models", "models", _json("ModelList")),
            paths["MODELS"] + "/{model}": _page("Get a model", "models", _json("ModelObject"), (404,), model=True),
            paths["MODELS"] + "/{model}/ready": _page(
                "Readiness of a model", "models", _json("Readiness"), (404,), model=True
            ),
            paths["HEALTH"]: health,
            paths["LIVE"]: _page("Liveness of the process", "system", _json("Live")),
            paths["METRICS"]: _page("Prometheus metrics", "system", text),
            "/status": _page("Status of models and routers", "system", _json("Status")),
            "/busy_threshold": busy,
            "/conditional_disagg": split,
        },
        "components": {"schemas": _schemas()},
    }


def page(doc: dict[str, Any]) -> bytes:
    """The same as one HTML page that loads nothing from anywhere."""
    rows = []
    for path, operations in doc["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            named = body.get("$ref", "").rpartition("/")[2]
            link = f'<a href="#{named}">{named}</a>' if named else ""
            statuses = ", ".join(operation["responses"])
            rows.append(
                f"<tr><td><b>{method.upper()}</b></td><td><code>{html.escape(path)}</code></td>"
                f"<td>{html.escape(operation['summary'])}</td><td>{link}</td><td>{statuses}</td></tr>"
            )
    schemas = "".join(
        f'<h3 id="{name}">{name}</h3><p>{html.escape(schema.get("description", ""))}</p>'
        f"<pre>{html.escape(msgspec.json.format(msgspec.json.encode(schema)).decode())}</pre>"
        for name, schema in doc["components"]["schemas"].items()
    )
    title = html.escape(doc["info"]["title"])
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }}
td, th {{ border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: left }} table {{ border-collapse: collapse }}
pre {{ background: #f5f5f5; overflow: auto; padding: 1em }}</style></head><body><h1>{title}</h1>
<p>{html.escape(doc["info"]["description"])} Machine-readable: <a href="/openapi.json">/openapi.json</a>.</p>
<table><tr><th></th><th>Path</th><th></th><th>Body</th><th>Answers</th></tr>{"".join(rows)}</table>
<h2>Schemas</h2>{schemas}</body></html>""".encode()
