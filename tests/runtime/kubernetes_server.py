"""How do tests run an API server of Kubernetes, hurt it, and look into it past the code under test?

`ScriptedApiServer` is not a real one: no package brings one. It is real HTTP, and does what the API's reference
says of the requests that discovery makes: lists in pages, watches from a version on, bookmarks, 410 for what was
forgotten, server-side apply, the `Status` of every refusal. `RealApiServer` is the real thing, for whoever has a
`kube-apiserver` on the PATH or in TEST_KUBE_APISERVER: the same tests then run against both.
"""

import asyncio
import contextlib
import json
import os
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml
from aiohttp import web

from dynamo.runtime.discovery.kubernetes.__main__ import manifests
from dynamo.runtime.discovery.kubernetes.objects import ENABLED, POD_UID
from dynamo.runtime.discovery.kubernetes.settings import Credentials, KubernetesSettings, Pod
from tests.runtime.etcd_server import EtcdServer, make_certificates
from tests.runtime.server_process import ServerProcess, free_ports

NAMESPACE = "models"
TOKEN = "the-token"
WORKERS, SLICES = "dynamoworkermetadatas", "endpointslices"

Object = dict[str, Any]


class Cluster(Protocol):
    """What the tests need of either server."""

    def settings(self, pod: Pod | None = None, **more: Any) -> KubernetesSettings: ...
    async def add_pod(self, name: str, ready: bool | None = True) -> Pod: ...
    async def set_ready(self, pod: Pod, ready: bool | None) -> None: ...
    async def workers(self) -> dict[str, Object]: ...
    async def delete_workers(self) -> None: ...


def slice_of(pod: Pod, ready: bool, version: str) -> Object:
    """As the controller of the service `3-service.yaml` writes it; one pod in each."""
    return {
        "apiVersion": f"discovery.k8s.io/{version}",
        "kind": "EndpointSlice",
        "metadata": {"name": f"dynamo-discovery-{pod.name}", "labels": {ENABLED: "true"}},
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": ["10.0.0.1"],
                "conditions": {"ready": ready},
                "targetRef": {"kind": "Pod", "name": pod.name, "namespace": NAMESPACE, "uid": pod.uid},
            }
        ],
        "ports": [],
    }


def settings_for(server: str, credentials: Credentials, pod: Pod | None, more: dict[str, Any]) -> KubernetesSettings:
    """As in a cluster, but quicker."""
    quick = {"startup_s": 5.0, "beat_s": 0.2, "doubt_s": 0.5, "attempt_s": 2.0} | more
    return KubernetesSettings(server, NAMESPACE, credentials, pod, **quick)


# --- the scripted one


@dataclass
class Kind:
    """All objects of a kind, and what happened to them."""

    plural: str
    objects: dict[str, Object] = field(default_factory=dict)
    events: list[tuple[int, str, Object]] = field(default_factory=list)
    forgotten: int = 0
    """Changes up to this version cannot be had any more."""


class Held:
    """Answers that are held back."""

    def __init__(self) -> None:
        self.held = 0
        self._go = asyncio.Event()

    async def wait(self) -> None:
        self.held += 1
        await self._go.wait()

    def release(self) -> None:
        self._go.set()


class ScriptedApiServer:
    """One API server, on a port of its own. What it holds outlives its being stopped, as etcd's content does."""

    def __init__(self) -> None:
        [self.port] = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.tokens = {TOKEN}
        self.forbidden: set[tuple[str, str]] = set()
        """(verb, resource) that the role does not grant."""
        self.defined = True
        """Whether the cluster knows our kind of object."""
        self.overloaded = 0
        """So many requests are turned away with 429."""
        self.page = 500
        self.seen: list[str] = []
        """(verb resource) of every request."""
        self.listed: list[str] = []
        """The label selector of every list."""
        self.kinds = {plural: Kind(plural) for plural in (WORKERS, SLICES)}
        self._version = 100
        self._uids = 0
        self._changed = asyncio.Condition()
        self._cuts = 0
        self._held: Held | None = None
        self._runner: web.AppRunner | None = None

    # --- for tests

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/apis/{group}/{version}/namespaces/{namespace}/{plural}", self._collection)
        app.router.add_route("*", "/apis/{group}/{version}/namespaces/{namespace}/{plural}/{name}", self._one)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        """As a machine that is switched off: connections break, and nothing listens."""
        await self.cut_watches()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def cut_watches(self) -> None:
        """Break every watch, in the middle of its answer."""
        self._cuts += 1
        async with self._changed:
            self._changed.notify_all()

    def hold_lists(self) -> "Held":
        """From now on a list of all workers that was made is not sent before it is released."""
        self._held = Held()
        return self._held

    def forget(self) -> None:
        """Let no watch begin at what was."""
        for kind in self.kinds.values():
            kind.events.clear()
            kind.forgotten = self._version

    def settings(self, pod: Pod | None = None, **more: Any) -> KubernetesSettings:
        credentials = more.pop("credentials", Credentials(TOKEN))
        return settings_for(self.url, credentials, pod, more)

    async def add_pod(self, name: str, ready: bool | None = True) -> Pod:
        self._uids += 1
        pod = Pod(name, f"uid-{self._uids}")
        await self.set_ready(pod, ready)
        return pod

    async def set_ready(self, pod: Pod, ready: bool | None) -> None:
        """None: no slice names it."""
        wanted = slice_of(pod, bool(ready), "v1")
        await self._store(SLICES, wanted["metadata"]["name"], None if ready is None else wanted)

    async def workers(self) -> dict[str, Object]:
        return dict(self.kinds[WORKERS].objects)

    async def delete_workers(self) -> None:
        """As `kubectl delete dwm --all`."""
        for name in tuple(self.kinds[WORKERS].objects):
            await self._store(WORKERS, name, None)

    # --- what it holds

    async def _store(self, plural: str, name: str, wanted: Object | None) -> Object:
        kind = self.kinds[plural]
        before = kind.objects.pop(name, None)
        if wanted is None and before is None:
            return {}
        self._version += 1
        stored = json.loads(json.dumps(wanted or before))
        stored["metadata"]["resourceVersion"] = str(self._version)
        how = "DELETED" if wanted is None else "ADDED" if before is None else "MODIFIED"
        if wanted is not None:
            kind.objects[name] = stored
        kind.events.append((self._version, how, stored))
        async with self._changed:
            self._changed.notify_all()
        return stored

    # --- requests

    async def _collection(self, request: web.Request) -> web.StreamResponse:
        plural = request.match_info["plural"]
        refused = self._refuse(request, "watch" if "watch" in request.query else "list")
        if refused is not None:
            return refused
        if "watch" in request.query:
            return await self._watch(request, self.kinds[plural])
        selector = request.query.get("labelSelector", "")
        self.listed.append(selector)
        chosen = [one for _, one in sorted(self.kinds[plural].objects.items()) if selected(one, selector)]
        begin = int(request.query.get("continue", "0"))
        end = begin + min(self.page, int(request.query.get("limit", "500")))
        metadata = {"resourceVersion": str(self._version)} | ({"continue": str(end)} if end < len(chosen) else {})
        body = json.dumps({"kind": "List", "metadata": metadata, "items": chosen[begin:end]})
        if self._held is not None and selector == POD_UID:
            await self._held.wait()
        return web.json_response(text=body)

    async def _watch(self, request: web.Request, kind: Kind) -> web.StreamResponse:
        since = int(request.query["resourceVersion"])
        if since < kind.forgotten:
            return status(410, "Expired", f"too old resource version: {since} ({kind.forgotten})")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        cuts, selector = self._cuts, request.query.get("labelSelector", "")
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(float(request.query["timeoutSeconds"])):
                while self._cuts == cuts:
                    for version, how, one in [event for event in kind.events if event[0] > since]:
                        since = version
                        if selected(one, selector):
                            await send(response, how, one)
                    async with self._changed:
                        if not any(event[0] > since for event in kind.events) and self._cuts == cuts:
                            await self._changed.wait()
        if self._cuts != cuts and request.transport is not None:
            request.transport.abort()
            return response
        bookmark = {"kind": "DynamoWorkerMetadata", "metadata": {"resourceVersion": str(self._version)}}
        with contextlib.suppress(ConnectionError):
            await send(response, "BOOKMARK", bookmark)
        return response

    async def _one(self, request: web.Request) -> web.StreamResponse:
        plural, name = request.match_info["plural"], request.match_info["name"]
        verb = {"PATCH": "patch", "DELETE": "delete", "GET": "get"}[request.method]
        there = name in self.kinds[plural].objects
        refused = self._refuse(request, verb)
        if refused is None and verb == "patch" and not there:
            refused = self._refuse(request, "create")
        if refused is not None:
            return refused
        if verb == "patch":
            assert request.content_type == "application/apply-patch+yaml"
            assert request.query["fieldManager"]
            # There is one manager of all fields: what it applies is all there is.
            applied = await self._store(plural, name, json.loads(await request.read()))
            return web.json_response(applied, status=200 if there else 201)
        if not there:
            return status(404, "NotFound", f'{plural}.nvidia.com "{name}" not found', name)
        if verb == "delete":
            await self._store(plural, name, None)
            return web.json_response({"kind": "Status", "status": "Success", "details": {"name": name}})
        return web.json_response(self.kinds[plural].objects[name])

    def _refuse(self, request: web.Request, verb: str) -> web.Response | None:
        plural, group = request.match_info["plural"], request.match_info["group"]
        self.seen.append(f"{verb} {plural}")
        if self.overloaded > 0:
            self.overloaded -= 1
            return status(429, "TooManyRequests", "the server has received too many requests")
        if request.headers.get("Authorization", "").removeprefix("Bearer ") not in self.tokens:
            return status(401, "Unauthorized", "Unauthorized")
        if (verb, plural) in self.forbidden:
            user = f"system:serviceaccount:{NAMESPACE}:default"
            said = (
                f'{plural}.{group} is forbidden: User "{user}" cannot {verb} resource "{plural}" in API group '
                f'"{group}" in the namespace "{NAMESPACE}"'
            )
            return status(403, "Forbidden", said)
        if plural == WORKERS and not self.defined:
            return web.Response(status=404, text="404 page not found\n")
        return None


def status(code: int, reason: str, message: str, name: str = "") -> web.Response:
    """An answer that is an error."""
    body: Object = {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code}
    return web.json_response(body | ({"details": {"name": name}} if name else {}), status=code)


def selected(one: Object, selector: str) -> bool:
    """Of the selectors there are: `label` and `label=value`."""
    label, equals, value = selector.partition("=")
    labels = one["metadata"].get("labels", {})
    return not selector or (label in labels and (not equals or labels[label] == value))


async def send(response: web.StreamResponse, how: str, one: Object) -> None:
    await response.write(json.dumps({"type": how, "object": one}).encode() + b"\n")


@contextlib.asynccontextmanager
async def scripted() -> AsyncIterator[ScriptedApiServer]:
    """One that runs, stopped in the end."""
    server = ScriptedApiServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


# --- the real one


def real_binary() -> str | None:
    """Where a real API server is, if there is one."""
    return os.environ.get("TEST_KUBE_APISERVER") or shutil.which("kube-apiserver")


class RealApiServer(ServerProcess):
    """The real server on a real etcd, with roles in force: our own account may do what `2-rbac.yaml` grants."""

    slices_version = os.environ.get("TEST_KUBE_SLICES", "v1")

    def __init__(self, directory: Path, etcd: EtcdServer) -> None:
        super().__init__(directory)
        self._etcd = etcd
        [self.port] = free_ports(1)
        self.url = f"https://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, or start again with the data of before."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / "ca.pem").exists():
            make_certificates(self.directory)
            (self.directory / "tokens").write_text(
                f"admin-token,admin,admin,system:masters\n"
                f"{TOKEN},system:serviceaccount:{NAMESPACE}:dynamo,dynamo,system:serviceaccounts\n"
                f"nobody-token,system:serviceaccount:{NAMESPACE}:nobody,nobody,system:serviceaccounts\n"
            )
        binary, at = real_binary(), self.directory
        assert binary is not None
        self.run([
            binary, f"--etcd-servers={self._etcd.url}", f"--secure-port={self.port}", "--bind-address=127.0.0.1",
            f"--tls-cert-file={at}/server.pem", f"--tls-private-key-file={at}/server.key", f"--cert-dir={at}",
            f"--token-auth-file={at}/tokens", "--authorization-mode=RBAC", "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://test", f"--service-account-key-file={at}/server.pem",
            f"--service-account-signing-key-file={at}/server.key", f"--etcd-prefix=/{self.directory.name}",
            "--disable-admission-plugins=ServiceAccount", "--watch-cache=true",
        ])  # fmt: skip

    def wait_ready(self) -> None:
        self.until(self._is_ready, 60)

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.request("GET", "/readyz", parse=False) == "ok")
        return False

    def request(self, method: str, path: str, body: Object | None = None, parse: bool = True) -> Any:
        """Ask it as the administrator, without the code under test."""
        headers = {"Authorization": "Bearer admin-token", "Content-Type": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = "application/apply-patch+yaml"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        context = ssl.create_default_context(cafile=str(self.directory / "ca.pem"))
        with urllib.request.urlopen(request, timeout=10, context=context) as response:
            answer = response.read().decode()
        return json.loads(answer) if parse else answer

    def apply(self, one: Object) -> None:
        """As `kubectl apply -n models` does."""
        group, _, version = one["apiVersion"].rpartition("/")
        plural = one["kind"].lower() + "s"
        where = (
            "" if plural == "customresourcedefinitions" or one["kind"] == "Namespace" else f"/namespaces/{NAMESPACE}"
        )
        for subject in one.get("subjects", []):
            subject.setdefault("namespace", NAMESPACE)
        root = f"/apis/{group}" if group else "/api"
        name = one["metadata"]["name"]
        try:
            self.request("PATCH", f"{root}/{version}{where}/{plural}/{name}?fieldManager=tests&force=true", one)
        except urllib.error.HTTPError as e:
            raise AssertionError(f"{one['kind']}: {e.read().decode()}") from e

    def install(self) -> None:
        """What `python -m dynamo.runtime.discovery.kubernetes | kubectl apply -f -` installs."""
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        for one in yaml.safe_load_all(manifests()):
            self.apply(one)
        self.until(self._is_defined, 20)

    def _is_defined(self) -> bool:
        with contextlib.suppress(OSError):
            return "items" in self.request("GET", self._path())
        return False

    def _path(self) -> str:
        return f"/apis/nvidia.com/v1alpha1/namespaces/{NAMESPACE}/{WORKERS}"

    def settings(self, pod: Pod | None = None, **more: Any) -> KubernetesSettings:
        token = more.pop("token", TOKEN)
        credentials = Credentials(token, ca_file=self.directory / "ca.pem")
        return settings_for(self.url, credentials, pod, {"slices_version": self.slices_version} | more)

    async def add_pod(self, name: str, ready: bool | None = True) -> Pod:
        wanted = {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {"containers": [{"name": "main", "image": "none"}]},
        }  # fmt: skip
        made = await asyncio.to_thread(self.request, "POST", f"/api/v1/namespaces/{NAMESPACE}/pods", wanted)
        pod = Pod(name, made["metadata"]["uid"])
        await self.set_ready(pod, ready)
        return pod

    async def set_ready(self, pod: Pod, ready: bool | None) -> None:
        wanted = slice_of(pod, bool(ready), self.slices_version)
        if ready is not None:
            await asyncio.to_thread(self.apply, wanted)
            return
        path = f"/apis/{wanted['apiVersion']}/namespaces/{NAMESPACE}/{SLICES}/{wanted['metadata']['name']}"
        with contextlib.suppress(urllib.error.HTTPError):
            await asyncio.to_thread(self.request, "DELETE", path)

    async def workers(self) -> dict[str, Object]:
        listed = await asyncio.to_thread(self.request, "GET", self._path())
        return {one["metadata"]["name"]: one for one in listed["items"]}

    async def delete_workers(self) -> None:
        await asyncio.to_thread(self.request, "DELETE", self._path())
