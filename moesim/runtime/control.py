"""The control protocol: one JSON line asks, JSON lines answer; both ends, without torch.

A request is {"op", "token", …}; answers are {"progress": text} while work goes on, then {"ok": true, …} or
{"ok": false, "error": text}. Lines are bounded, so is the time to send one, and so is the number of callers. The token
(MOESIM_TOKEN on both sides) is compared in constant time; without one only loopback addresses are served.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from moesim.errors import ApplyError, InputError, MoesimError, describe
from moesim.files import parse_json

MAX_LINE = 16 << 20
MAX_CALLERS = 8
REQUEST_S = 10.0
"""Time that a caller has to send its request."""
SILENCE_S = 30.0
"""Longest silence of a coordinator that a caller puts up with; it speaks every KEEPALIVE_S while it works."""
KEEPALIVE_S = 2.0


class Unreachable(ApplyError):
    """No deployment answers, or not in time."""


class StaleBase(ApplyError):
    """The deployment runs another placement than the one that a plan was made for."""


class RefusedPlan(ApplyError):
    """The deployment cannot run the plan."""


_SAID = {"StaleBase": StaleBase, "PlanError": RefusedPlan}
"""Kind of an error that a deployment answers with → the exception of the caller; any other is an ApplyError."""
Handler = Callable[[dict[str, Any], Callable[[str], None]], dict[str, Any]]


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of "HOST:PORT"; raise InputError if it is not one."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535 or len(host) > 253:
        raise InputError(describe("--to", "address", text, "must be HOST:PORT with a port in 1..65535", "serve-demo prints it as control"))
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Return True if `host` names this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_line(connection: socket.socket, deadline: float, buffer: bytearray) -> bytes:
    """Return the next line; raise ApplyError at `deadline` (monotonic), beyond MAX_LINE, or at an early end."""
    while b"\n" not in buffer:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ApplyError("timed out waiting for a line")
        connection.settimeout(left)
        try:
            data = connection.recv(1 << 16)
        except TimeoutError:
            raise ApplyError("timed out waiting for a line") from None
        except OSError as cause:
            raise ApplyError(f"the connection broke ({cause.strerror or cause})") from None
        if not data:
            raise ApplyError("the connection was closed before an answer")
        buffer += data
        if len(buffer) > MAX_LINE:
            raise ApplyError(f"a line is longer than {MAX_LINE} B")
    line, _, rest = bytes(buffer).partition(b"\n")
    buffer[:] = rest
    return line


def call(address: str, op: str, *, on_progress: Callable[[str], None] | None = None, deadline_s: float = math.inf, **fields: Any) -> dict[str, Any]:
    """Ask the deployment at `address` and return its answer; raise ApplyError with its reason if it refuses, Unreachable if it is silent.

    deadline_s: longest wait for the answer, however busy the deployment says that it is.
    """
    deadline = time.monotonic() + deadline_s
    host, port = parse_address(address)
    request = json.dumps({"op": op, "token": os.environ.get("MOESIM_TOKEN", ""), **fields}).encode() + b"\n"
    try:
        connection = socket.create_connection((host, port), timeout=5)
    except (OSError, UnicodeError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise Unreachable(f"{address}: no deployment answers there ({reason}); check the address that serve-demo printed") from None
    with connection:
        try:
            connection.sendall(request)
        except OSError as cause:
            raise Unreachable(f"{address}: the connection broke ({cause.strerror or cause})") from None
        for answer in _answers(connection, address, deadline):
            if "ok" not in answer:
                if on_progress is not None and answer.get("progress"):
                    on_progress(str(answer["progress"]))
            elif answer["ok"] is True:
                return answer
            else:
                raise _SAID.get(str(answer.get("kind")), ApplyError)(f"{address}: {answer.get('error', 'refused without a reason')}")
    raise AssertionError("unreachable")


def _answers(connection: socket.socket, address: str, deadline: float) -> Iterator[dict[str, Any]]:
    buffer = bytearray()
    while True:
        try:
            answer = parse_json(read_line(connection, min(time.monotonic() + SILENCE_S, deadline), buffer), address, error=InputError)
        except MoesimError as cause:
            raise Unreachable(f"{address}: {cause}; the deployment may have ended, or this is another service") from None
        if not isinstance(answer, dict) or not ("ok" in answer or "progress" in answer):
            raise ApplyError(f"{address}: answers with something else than a moesim deployment does; check the address")
        yield answer


class ControlServer:
    """Listens for requests and hands them to a handler, each caller in a thread of its own."""

    def __init__(self, host: str, port: int, handler: Handler, *, token: str = "") -> None:
        """Bind `host`:`port` (0: any free port). Raises InputError if it is taken, or open to others without a token."""
        if not token and not is_loopback(host):
            raise InputError(describe("serve-demo", "host", host, "is reachable by others and needs a token", "set MOESIM_TOKEN"))
        self._handler, self._token = handler, token
        self._callers = threading.BoundedSemaphore(MAX_CALLERS)
        self._closed = False
        try:
            self._socket = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=MAX_CALLERS)
        except OSError as cause:
            rule = f"cannot be bound on {host} ({cause.strerror or cause})"
            raise InputError(describe("serve-demo", "port", port, rule, "give another --port, or 0 for any")) from None
        self.host, self.port = host, int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="moesim-control", daemon=True)

    def start(self) -> None:
        """Begin to accept callers."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._closed = True
        self._socket.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if not self._callers.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        lock, finished = threading.Lock(), threading.Event()

        def send(answer: dict[str, Any]) -> None:
            try:
                with lock:
                    connection.settimeout(REQUEST_S)
                    connection.sendall(json.dumps(answer).encode() + b"\n")
            except OSError:
                pass  # the caller has gone; what it asked for goes on

        def keep_alive() -> None:
            while not finished.wait(KEEPALIVE_S):
                send({"progress": ""})

        try:
            with connection:
                try:
                    request = parse_json(read_line(connection, time.monotonic() + REQUEST_S, bytearray()), "request", error=InputError)
                    if not isinstance(request, dict) or not isinstance(request.get("op"), str):
                        raise InputError("request: must be an object with an op")
                    if not hmac.compare_digest(str(request.get("token", "")).encode(), self._token.encode()):
                        raise InputError("the token is wrong; set MOESIM_TOKEN to that of the deployment")
                    threading.Thread(target=keep_alive, daemon=True).start()
                    answer = {"ok": True, **self._handler(request, lambda text: send({"progress": text}))}
                except MoesimError as error:
                    answer = {"ok": False, "error": str(error), "kind": type(error).__name__}
                except Exception as error:
                    answer = {"ok": False, "error": f"internal error: {type(error).__name__}: {error}"}
                finally:
                    finished.set()
                send(answer)
        finally:
            self._callers.release()
