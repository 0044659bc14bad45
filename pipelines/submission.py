"""Send a compiled pipeline to a Kubeflow Pipelines API server, having checked first everything that can be checked here.

`kfp.Client` checks neither the names nor the types of arguments, has no time limits, and answers with tracebacks; this module adds those.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfpo_core.config import PipelineConfig
from dfpo_core.errors import UserError

FINAL_STATES = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED", "CANCELLED", "ERROR")
POLL_SECONDS = 10


@dataclass(frozen=True)
class Server:
    """Where to submit to. An empty host means the API server of the cluster that this process runs in."""

    host: str = ""
    namespace: str = ""
    token: str = ""
    timeout: int = 30
    """Seconds that one request may take."""

    @property
    def url(self) -> str:
        host = self.host.rstrip("/")
        return host if not host or "://" in host else f"https://{host}"


def read_arguments(compiled: Path, given: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` texts as typed arguments of the compiled pipeline. Raises UserError for unknown names and wrong types."""
    import yaml

    parameters = next(yaml.safe_load_all(compiled.read_text(encoding="utf-8")))["root"]["inputDefinitions"]["parameters"]
    arguments = {}
    for item in given:
        name, sign, text = item.partition("=")
        if not sign:
            raise UserError("--param", f"{item!r} has no '='", "write NAME=VALUE, e.g. --param steps=10")
        if name not in parameters:
            raise UserError(f"--param {name}", "the pipeline has no such parameter", f"choose one of: {', '.join(parameters)}")
        arguments[name] = _typed(name, text, parameters[name]["parameterType"])
    count = arguments.get("gpu_count", "0")
    if not re.fullmatch(r"[0-9]+", count):
        raise UserError("--param gpu_count", f"{count!r} is no whole number", "write 0, 1, 2, …")
    return arguments


def _typed(name: str, text: str, kind: str) -> Any:
    readers = {"STRING": str, "NUMBER_INTEGER": int, "NUMBER_DOUBLE": float}
    try:
        return readers.get(kind, json.loads)(text)
    except ValueError:
        wanted = {"NUMBER_INTEGER": "a whole number", "NUMBER_DOUBLE": "a number"}.get(kind, "JSON")
        raise UserError(f"--param {name}", f"{text!r} is not {wanted}", "correct the value") from None


def check_for_cluster(config: PipelineConfig) -> list[UserError]:
    """What would be lost or impossible in pods: stores on a pod's own disk, GPUs without a type."""
    problems = []
    cluster = config.cluster
    on_volume = bool(cluster.pvc) and config.home_path.is_relative_to(cluster.pvc_mount_path)
    local_store = config.tracking_uri.startswith(("sqlite:", "file:"))
    if local_store and not on_volume:
        problem = "a local store would end with the first pod"
        problems.append(UserError("tracking.uri", problem, "set the URI of an MLflow server, or home to a folder of cluster.pvc"))
    if cluster.gpu_count and not cluster.gpu_type:
        problems.append(UserError("cluster.gpu_type", f"{cluster.gpu_count} GPUs asked for without a type", "set it, e.g. nvidia.com/gpu"))
    if cluster.retries and not on_volume and not config.train.checkpoint_uri:
        problem = "is empty, and a retried training pod would find no state"
        problems.append(UserError("train.checkpoint_uri", problem, "set a URL, home to a folder of cluster.pvc, or cluster.retries to 0"))
    return problems


def submit(compiled: Path, arguments: dict[str, Any], server: Server, experiment: str, run_name: str) -> tuple[str, str]:
    """Create the run; returns its id and the address of its page. One POST, never repeated. Raises UserError."""
    _check_reachable(server)
    unsure = "the run may exist all the same: look for it in the KFP UI before submitting again"
    with _one_line_errors(server, unsure), _deadline(server.timeout), _quiet():
        client = _client(server)
        result = client.create_run_from_pipeline_package(
            str(compiled), arguments=arguments, run_name=run_name, experiment_name=experiment, namespace=server.namespace or None
        )
    return result.run_id, f"{server.url}/#/runs/details/{result.run_id}"


def wait(run_id: str, server: Server) -> str:
    """Print each new state of the run until it ends; returns the final one. Raises UserError when the server stops answering."""
    state = ""
    while state not in FINAL_STATES:
        if state:
            time.sleep(POLL_SECONDS)
        with _one_line_errors(server, f"run {run_id} goes on: watch it in the KFP UI"), _deadline(server.timeout), _quiet():
            current = (_client(server).get_run(run_id).state or "PENDING").upper()
        if current != state:
            print(f"{time.strftime('%H:%M:%S')}  {current.lower()}", file=sys.stderr)
        state = current
    return state


def _client(server: Server):
    import kfp

    namespace = server.namespace or "kubeflow"
    return kfp.Client(host=server.url or None, namespace=namespace, existing_token=server.token or None, ui_host=server.url or None)


def _check_reachable(server: Server) -> None:
    """One request for the server's health: the client's own check would repeat it for half a minute."""
    if not server.url:
        if "KUBERNETES_SERVICE_HOST" not in os.environ:
            raise UserError("--host", "is missing, and this is no pod of a cluster", "give the address of the KFP API server")
        return
    request = urllib.request.Request(f"{server.url}/apis/v2beta1/healthz")
    if server.token:
        request.add_header("Authorization", f"Bearer {server.token}")
    try:
        urllib.request.urlopen(request, timeout=server.timeout).close()
    except urllib.error.HTTPError as error:
        raise _refused(server, error.code, error.reason) from None
    except (OSError, ValueError) as error:
        raise _unreachable(server, getattr(error, "reason", error)) from None


@contextmanager
def _one_line_errors(server: Server, unsure: str) -> Iterator[None]:
    """UserError for whatever a request can end in; `unsure` is the advice where the server may have acted without answering."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError, ProtocolError, ReadTimeoutError

    try:
        yield
    except ApiException as error:
        raise _refused(server, error.status, _message(error)) from None
    except (TimeoutError, ReadTimeoutError):
        raise UserError("--host", f"no answer from {server.url} within {server.timeout} s", unsure) from None
    except ProtocolError:
        raise UserError("--host", f"{server.url} closed the connection without an answer", unsure) from None
    except (HTTPError, OSError) as error:
        raise _unreachable(server, error) from None


def _refused(server: Server, status: int, reason: str) -> UserError:
    fixes = {401: "give a valid token with --token-file", 403: "check the token's rights in --namespace", 404: "check --host"}
    fix = fixes.get(status, "check the server's log" if status >= 500 else "correct the request")
    return UserError("--host", f"{server.url} answered HTTP {status} ({reason})", fix)


def _unreachable(server: Server, reason: Any) -> UserError:
    text = "certificate not trusted" if isinstance(reason, ssl.SSLError) else str(reason) or type(reason).__name__
    problem = f"no KFP API server answers at {server.url} ({text[:200]})"
    return UserError("--host", problem, "check the address, and that a port-forward is open")


def _message(error: Any) -> str:
    try:
        body = json.loads(error.body)
        return str(body.get("message") or body.get("error") or error.reason)[:300]
    except (TypeError, ValueError, AttributeError):  # no body, or not the JSON that the API server sends
        return str(error.reason)


@contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    """TimeoutError after `seconds`; the generated client has no time limit of its own. Main thread only."""

    def expire(signum, frame):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's own prints, warnings and logged tracebacks: what matters is printed by the caller."""
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
