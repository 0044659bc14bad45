"""A KFP API server for tests: it keeps experiments and runs in memory, and validates every request and every answer.

The description it validates against is rebuilt from the installed `kfp_server_api`, which the KFP project generates from its OpenAPI
document: paths, methods, query parameters, request and answer models, enumerations. It is therefore that of the pinned version. Two
things differ from the document: properties it does not name are refused, and a `google.protobuf.Value` may be any JSON (the document
says object, though numbers and text are what run parameters hold).
"""

from __future__ import annotations

import inspect
import json
import re
import socket
import threading
import time
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import kfp_server_api
from openapi_core import OpenAPI
from openapi_core.exceptions import OpenAPIError
from openapi_core.testing import MockRequest, MockResponse

PREFIX = "/apis/v2beta1/"
ANY_JSON = {("V2beta1RuntimeConfig", "parameters"), ("V2beta1MetadataValue", "value")}
PLAIN = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "datetime": {"type": "string", "format": "date-time"},
    "object": {"type": "object"},
}


@cache
def openapi_document() -> dict[str, Any]:
    """OpenAPI 3.0 of the KFP API, from the generated client."""
    paths: dict[str, Any] = {}
    for service in vars(kfp_server_api.api).values():
        for name, method in vars(service).items() if inspect.isclass(service) else ():
            if name.endswith("_with_http_info"):
                path, verb, operation = _operation(name, method)
                paths.setdefault(path, {})[verb] = operation
    models = {name: model for name, model in vars(kfp_server_api.models).items() if inspect.isclass(model)}
    return {
        "openapi": "3.0.3",
        "info": {"title": "Kubeflow Pipelines API", "version": kfp_server_api.__version__},
        "paths": paths,
        "components": {"schemas": {name: _model(name, model) for name, model in models.items()}},
    }


def _operation(name: str, method: Any) -> tuple[str, str, dict[str, Any]]:
    source, described = inspect.getsource(method), inspect.getdoc(method)
    path, verb = re.search(r"call_api\(\s*'([^']+)', '([A-Z]+)'", source).groups()
    types = dict(re.findall(r":type (\w+): (.+)", described))
    required = re.findall(r":param (\w+):.*\(required\)", described)
    parameters = [{"name": key, "in": "path", "required": True, "schema": PLAIN["str"]} for key in re.findall(r"{([\w.]+)}", path)]
    for key in re.findall(r"query_params\.append\(\('(\w+)'", source):
        parameters.append({"name": key, "in": "query", "required": key in required, "schema": _schema(types[key])})
    answer = re.search(r":rtype: tuple\((.+), status_code", described)
    operation: dict[str, Any] = {"operationId": name.removesuffix("_with_http_info"), "parameters": parameters}
    operation["responses"] = {"200": {"description": "", "content": {"application/json": {"schema": _schema(answer[1])}}}}
    body = re.search(r"body_params = local_var_params\['(\w+)'\]", source)
    if body:
        content = {"application/json": {"schema": _schema(types[body[1]])}}
        operation["requestBody"] = {"required": body[1] in required, "content": content}
    return path, verb.lower(), operation


def _model(name: str, model: Any) -> dict[str, Any]:
    if hasattr(model, "allowable_values"):
        return {"type": "string", "enum": model.allowable_values}
    properties = {model.attribute_map[key]: _schema(kind, (name, key) in ANY_JSON) for key, kind in model.openapi_types.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _schema(kind: str, any_json: bool = False) -> dict[str, Any]:
    kind = kind.partition(", optional")[0].strip()
    if kind.startswith("list["):
        return {"type": "array", "items": _schema(kind[5:-1])}
    if kind.startswith("dict("):
        return {"type": "object", "additionalProperties": {} if any_json else _schema(kind.partition(", ")[2][:-1])}
    if any_json:
        return {}
    return PLAIN.get(kind) or ({"type": "string"} if kind == "file" else {"$ref": f"#/components/schemas/{kind}"})


@cache
def api() -> OpenAPI:
    return OpenAPI.from_dict(openapi_document())


def unknown_parameters(method: str, path: str, query: dict[str, str]) -> set[str]:
    """The names in a query that the API does not have; openapi-core lets them pass."""
    for template, verbs in openapi_document()["paths"].items():
        if re.fullmatch(re.sub(r"{[\w.]+}", "[^/:]+", template), path) and method.lower() in verbs:
            return set(query) - {parameter["name"] for parameter in verbs[method.lower()]["parameters"]}
    return set()


class KfpServer(ThreadingHTTPServer):
    """`plan` maps (method, last part of the path) to what becomes of its requests, one after the other; then all go well:
    a status, "hang", "drop", "page" (a login page), or one of the first two with "then " before it: done, and then answered so."""

    def __init__(self, plan=None, states=("SUCCEEDED",), multi_user=False, credentials="", plugin_output=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan = {key: list(value) if isinstance(value, (list, tuple)) else [value] for key, value in (plan or {}).items()}
        self.states, self.multi_user, self.credentials, self.plugin_output = list(states), multi_user, credentials, plugin_output
        self.experiments: dict[str, dict] = {}
        self.runs: dict[str, dict] = {}
        self.recurring_runs: dict[str, dict] = {}
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self.violations: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that hung up is part of the tests."""

    def bodies(self, path: str) -> list[dict]:
        return [body for method, where, _, body in self.requests if (method, where) == ("POST", path)]

    def act(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        """(status, answer) of a request that is valid."""
        kind, _, rest = path.partition("/")
        if kind == "healthz":
            return 200, {"multi_user": self.multi_user}
        items, key = {"experiments": (self.experiments, "experiment_id"), "runs": (self.runs, "run_id")}.get(
            kind, (self.recurring_runs, "recurring_run_id")
        )
        if method == "POST" and not rest:
            name = f"{kind[0]}{len(items) + 1}"
            items[name] = body | {key: name}
            if kind == "runs" and self.plugin_output:
                items[name]["plugins_output"] = self.plugin_output
            return 200, items[name]
        if not rest:
            wanted = [predicate for predicate in json.loads(query.get("filter") or "{}").get("predicates", [])]
            found = [item for item in items.values() if all(_matches(item, predicate) for predicate in wanted)]
            return 200, {"recurringRuns" if kind == "recurringruns" else kind: found}
        name, _, action = rest.partition(":")
        if name not in items:
            return 404, {"message": f"{key} {name} not found"}
        if action:
            items[name]["mode"] = action.upper()
            return 200, {}
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        run = items[name] | (state if isinstance(state, dict) else {"state": state})
        return 200, run


def _matches(item: dict, predicate: dict) -> bool:
    operation = predicate["operation"]
    text = predicate.get("string_value", predicate.get("stringValue"))  # protobuf JSON takes both spellings, and numbers for enumerations
    value = item.get(predicate["key"], "")
    return value == text if operation in ("EQUALS", 1) else {"IS_SUBSTRING": text in value}[operation]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.handle_api(None)

    def do_DELETE(self):
        self.handle_api(None)

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.handle_api(json.loads(self.rfile.read(length)) if length else None)

    def handle_api(self, body: Any) -> None:
        server, where = self.server, urlsplit(self.path)
        path, query = where.path.removeprefix(PREFIX), dict(parse_qsl(where.query))  # an empty value is as good as none
        server.requests.append((self.command, path, query, body))
        if server.credentials and server.credentials not in (self.headers.get("Authorization"), self.headers.get("Cookie")):
            return self.reply(401, {"message": "who are you?"})
        request = MockRequest(
            "http://localhost",
            self.command.lower(),
            where.path,
            args=query,
            data=None if body is None else json.dumps(body).encode(),
        )
        if unknown := unknown_parameters(self.command, where.path, query):
            server.violations.append(f"{self.command} {self.path}: unknown query parameters {unknown}")
        try:
            api().validate_request(request)
        except OpenAPIError as error:
            server.violations.append(f"{self.command} {self.path}: {error!r} {error.__cause__ or ''}")
            return self.reply(422, {"message": str(error)})
        planned = server.plan.get((self.command, path))
        fate = planned.pop(0) if planned else ""
        if isinstance(fate, int):
            return self.reply(fate, {"message": f"refused with {fate}"})
        if fate and not str(fate).startswith("then "):
            return self.misbehave(fate)
        status, answer = server.act(self.command, path, query, body)
        if fate:
            fate = fate.removeprefix("then ")
            return self.reply(int(fate), {"message": f"refused with {fate}"}) if fate.isdigit() else self.misbehave(fate)
        if status == 200:
            try:
                api().validate_response(request, MockResponse(json.dumps(answer).encode(), 200))
            except OpenAPIError as error:
                server.violations.append(f"answer to {self.command} {self.path}: {error!r} {error.__cause__ or ''}")
        return self.reply(status, answer)

    def misbehave(self, how: str) -> None:
        if how == "hang":
            time.sleep(4)
        elif how == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.reply(200, "<html>Log in</html>", "text/html")

    def reply(self, status: int, value: Any, kind: str = "application/json") -> None:
        data = json.dumps(value).encode() if kind == "application/json" else value.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Keep the tests' output clean."""
