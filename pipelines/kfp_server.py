"""The connection to a Kubeflow Pipelines API server: who asks, a time limit for each request, and one line for each way it can fail.

`kfp.Client` has no time limits, repeats its own health check for half a minute, and answers with tracebacks; this module adds what is
missing and uses it for the rest.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfpo_core.errors import UserError

IN_CLUSTER_URL = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
NOT_NOW = (408, 429)  # the statuses below 500 that another try can change


@dataclass(frozen=True)
class Server:
    """Where to submit to and as whom. An empty host means the API server of the cluster that this process runs in."""

    host: str = ""
    namespace: str = ""
    token_file: str = ""
    """File with a bearer token, read again for each request: a token that is renewed there stays valid."""
    cookie_file: str = ""
    """File with the Cookie header of a browser session."""
    ui_host: str = ""
    """Address of the web pages, for links, where it is not the API's."""
    ca_file: str = ""
    """File with the certificates to trust instead of the usual ones."""
    timeout: int = 30
    """Seconds that one request may take."""

    @property
    def url(self) -> str:
        return _with_scheme(self.host) or IN_CLUSTER_URL

    def link(self, page: str) -> str:
        return f"{_with_scheme(self.ui_host) or self.url}/#/{page}"


class ServerFailure(Exception):
    """The server did not do its part; nobody's mistake. Shown as one line, and ends the command with code 1."""

    def __init__(self, problem: str, fix: str = "", timed_out: bool = False):
        self.problem, self.timed_out = problem, timed_out
        super().__init__(" ".join(f"--host: {problem}{'; ' + fix if fix else ''}".split()))


class DeadlinePassed(Exception):
    """A request took too long. No OSError, as TimeoutError is: urllib3 would take that for a broken connection and try again."""


class Refused(UserError):
    """The server understood the request and refused it (HTTP 4xx)."""

    def __init__(self, status: int, problem: str, fix: str):
        self.status = status
        super().__init__("--host", problem, fix)


def connect(server: Server):
    """A `kfp.Client` of a server that has just answered and takes the credentials. Raises UserError, or ServerFailure."""
    if not server.host and not in_cluster():
        raise UserError("--host", "is missing, and this is no pod of a cluster", "give the address of the KFP API server")
    if server.namespace and not DNS_LABEL.fullmatch(server.namespace):
        raise UserError("--namespace", f"{server.namespace!r} is no namespace", "use lower-case letters, digits and dashes")
    token_file, cookie = _token_file(server), read_secret("--cookie-file", server.cookie_file)
    token = read_secret("--token-file", token_file)
    if server.ca_file and not Path(server.ca_file).is_file():
        raise UserError("--ca-file", f"no file {server.ca_file}", "give the path of a PEM file")
    health = _health(server, token, cookie)
    if health.get("multi_user") and not server.namespace:
        raise UserError("--namespace", "is missing, and the server has many users", "give the namespace of your profile")
    if server.namespace and not health.get("multi_user"):
        raise UserError("--namespace", "is given, but the server has one user only", "leave it out")
    import kfp

    with answers(server):
        return kfp.Client(
            host=server.url,
            namespace=server.namespace,
            credentials=kfp.client.ServiceAccountTokenVolumeCredentials(token_file) if token_file else None,
            cookies=cookie,
            ui_host=server.ui_host or server.url,
            ssl_ca_cert=server.ca_file or None,
        )


def in_cluster() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ


def read_secret(field: str, path: str) -> str:
    """The text of a file with a token or a cookie; "" for no path. Raises UserError."""
    if not path:
        return ""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(field, f"cannot read {path} ({getattr(error, 'strerror', None) or 'not text'})", "check the path") from None
    if not text or not text.isprintable():
        raise UserError(field, f"{path} {'holds more than one line' if text else 'is empty'}", "write the value alone into it")
    return text


def _token_file(server: Server) -> str:
    """The file given; inside a cluster the pod's own token for the API server, where one is mounted and no other server is named."""
    if server.token_file or server.host or server.cookie_file:
        return str(Path(server.token_file).expanduser()) if server.token_file else ""
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH

    path = os.environ.get(KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH)
    return path if Path(path).is_file() else ""


def _health(server: Server, token: str, cookie: str) -> dict[str, Any]:
    """What the server says of itself, from one request."""
    headers = {"Authorization": f"Bearer {token}" if token else "", "Cookie": cookie}
    try:
        request = urllib.request.Request(
            f"{server.url}/apis/v2beta1/healthz", headers={name: value for name, value in headers.items() if value}
        )
        context = ssl.create_default_context(cafile=server.ca_file) if server.ca_file else None
        with urllib.request.urlopen(request, timeout=server.timeout, context=context) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise _failed(server, error.code, error.reason) from None
    except TimeoutError:
        raise _late(server) from None
    except (OSError, ValueError) as error:
        raise _unreachable(server, getattr(error, "reason", error)) from None
    try:
        return dict(json.loads(text))
    except ValueError:  # where a login is needed, a proxy sends a page
        raise UserError(
            "--host", f"{server.url} answered with a page, not as a KFP API server", "check it, or log in: --token-file, --cookie-file"
        ) from None


@contextmanager
def answers(server: Server) -> Iterator[None]:
    """For a request by the client: silent, in time, and with UserError or ServerFailure for whatever it can end in."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError

    try:
        with _deadline(server.timeout), _quiet():
            yield
    except ApiException as error:
        raise _failed(server, error.status, _message(error)) from None
    except DeadlinePassed:
        raise _late(server) from None
    except MaxRetryError as error:
        if isinstance(error.reason, NewConnectionError):
            raise ServerFailure(f"nobody answers at {server.url}", "check that the server runs and a port-forward is open") from None
        raise ServerFailure(f"{server.url} closed the connection without an answer") from None
    except (HTTPError, OSError):
        raise ServerFailure(f"{server.url} closed the connection without an answer") from None
    except (TypeError, ValueError, AttributeError):  # what the generated client makes of an answer that is not its JSON
        raise ServerFailure(f"{server.url} answered with something else than KFP's JSON") from None


def _failed(server: Server, status: int, reason: str) -> Exception:
    problem = f"{server.url} answered HTTP {status} ({reason})"
    if status >= 500 or status in NOT_NOW:
        return ServerFailure(problem, "check the server's log", timed_out=status in (408, 504))
    fixes = {401: "give a valid token with --token-file", 403: "check the token's rights in --namespace", 404: "check --host"}
    return Refused(status, problem, fixes.get(status, "correct the request"))


def _late(server: Server) -> ServerFailure:
    return ServerFailure(f"no answer from {server.url} within {server.timeout} s", "check the server, or give it a longer --timeout", True)


def _unreachable(server: Server, reason: Any) -> UserError:
    if isinstance(reason, ssl.SSLError):
        return UserError("--host", f"the certificate of {server.url} is not trusted", "name your authority's file with --ca-file")
    problem = f"no KFP API server answers at {server.url} ({(str(reason) or type(reason).__name__)[:200]})"
    return UserError("--host", problem, "check the address, and that a port-forward is open")


def _message(error: Any) -> str:
    try:
        body = json.loads(error.body)
        return str(body.get("message") or body.get("error") or error.reason)[:300]
    except (TypeError, ValueError, AttributeError):  # no body, or not the JSON that the API server sends
        return str(error.reason)


def _with_scheme(host: str) -> str:
    host = host.rstrip("/")
    return host if not host or "://" in host else f"https://{host}"


@contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    """DeadlinePassed after `seconds`; the client has no time limit of its own. Main thread only."""

    def expire(signum, frame):
        raise DeadlinePassed

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
