"""An S3 server on 127.0.0.1: `python tests/s3_server.py PORT`. Buckets are in its memory and end with it.

moto answers the requests. Before it does, requests can be made to fail as object stores and networks do:

    POST   /_faults    {"kind": "503", "count": 3, "method": "GET", "key": "part"}    make the next 3 such requests fail
    GET    /_requests                                                                 count requests so far, by method
"""

import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

SLOW_S = 5.0  # longer than the client waits for data on a silent connection
XML = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>a test</Message></Error>"
ERRORS = {
    "403": ("403 Forbidden", "AccessDenied"),
    "429": ("429 Too Many Requests", "TooManyRequestsException"),
    "500": ("500 Internal Server Error", "InternalError"),
    "503": ("503 Slow Down", "SlowDown"),
}


class FaultyStore:
    """A WSGI application that passes requests on to another one, except for those that it was told to fail.

    Kinds of faults: a status in ERRORS; "reset" closes the connection without an answer, "cut" in the middle of the
    body; "slow" answers after SLOW_S. A fault with count 0 cancels all faults.
    """

    def __init__(self, store: Callable[..., Iterable[bytes]]):
        self._store = store
        self._faults: list[dict[str, Any]] = []
        self._requests: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_faults":
            fault = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            self._faults = [*self._faults, fault] if fault["count"] else []
            return _respond(start_response, "200 OK", b"")
        if environ["PATH_INFO"] == "/_requests":
            return _respond(start_response, "200 OK", json.dumps(self._requests).encode())
        self._requests[environ["REQUEST_METHOD"]] += 1
        kind = self._next_fault(environ)
        if kind == "slow":
            time.sleep(SLOW_S)
        if kind in (None, "slow"):
            return self._store(environ, start_response)
        if kind == "reset":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        if kind == "cut":
            body = b"".join(self._store(environ, start_response))
            return _cut(body, environ["werkzeug.socket"])
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, code = ERRORS[kind]
        return _respond(start_response, status, XML.format(code=code).encode())

    def _next_fault(self, environ: dict[str, Any]) -> str | None:
        for fault in self._faults:
            if fault.get("method", environ["REQUEST_METHOD"]) != environ["REQUEST_METHOD"]:
                continue
            if fault["count"] > 0 and fault.get("key", "") in environ["PATH_INFO"]:
                fault["count"] -= 1
                return fault["kind"]
        return None


def _respond(start_response: Callable, status: str, body: bytes) -> list[bytes]:
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _cut(body: bytes, connection: socket.socket) -> Iterable[bytes]:
    yield body[: len(body) // 2]
    connection.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    moto = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", int(sys.argv[1]), FaultyStore(moto), threaded=True, request_handler=MotoRequestHandler)
