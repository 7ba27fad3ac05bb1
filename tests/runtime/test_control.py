"""The control port answers its own callers and survives all others."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from moesim.errors import ApplyError, InputError
from moesim.runtime import control
from moesim.runtime.control import ControlServer, call, parse_address


def echo(request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    if request["op"] == "fail":
        raise ApplyError("no such luck")
    if request["op"] == "crash":
        raise ZeroDivisionError("oops")
    if request["op"] == "slow":
        progress("half")
        time.sleep(0.5)
    return {"echo": request.get("value")}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ControlServer]:
    monkeypatch.setenv("MOESIM_TOKEN", "secret")
    started = ControlServer("127.0.0.1", 0, echo, token="secret")
    started.start()
    yield started
    started.close()


def address(server: ControlServer) -> str:
    return f"127.0.0.1:{server.port}"


def raw(server: ControlServer, data: bytes) -> dict[str, Any]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").readline()
    return dict(json.loads(answer))


def test_a_call_returns_the_answer_and_progress(server: ControlServer) -> None:
    heard: list[str] = []
    assert call(address(server), "slow", value=[1], on_progress=heard.append)["echo"] == [1]
    assert heard == ["half"]


def test_silence_is_bounded_but_a_working_deployment_is_not_silent(server: ControlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SILENCE_S", 0.2)
    with pytest.raises(ApplyError, match="timed out"):
        call(address(server), "slow")
    monkeypatch.setattr(control, "KEEPALIVE_S", 0.05)
    assert call(address(server), "slow")["ok"]


@pytest.mark.parametrize(("op", "message"), [("fail", "no such luck"), ("crash", "internal error: ZeroDivisionError")])
def test_a_refusal_carries_its_reason(server: ControlServer, op: str, message: str) -> None:
    with pytest.raises(ApplyError, match=message):
        call(address(server), op)
    assert call(address(server), "echo", value=1)["echo"] == 1


def test_a_wrong_token_is_refused(server: ControlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("", "Secret", "é" * 10):
        monkeypatch.setenv("MOESIM_TOKEN", token)
        with pytest.raises(ApplyError, match="token is wrong"):
            call(address(server), "echo")


GARBAGE = [b"\n", b"[]\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b'{"op": 1}\n', b'{"op": "x", "op": "y"}\n', b'{"op": NaN}\n', b"[" * 100000 + b"\n"]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_gets_an_error_and_the_next_caller_an_answer(server: ControlServer, data: bytes) -> None:
    answer = raw(server, data)
    assert answer["ok"] is False
    assert "internal" not in answer["error"]
    assert call(address(server), "echo", value=2)["echo"] == 2


def test_an_endless_line_and_a_silent_caller_are_cut_off(server: ControlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_LINE", 1000)
    assert "longer than" in raw(server, b"x" * 5000)["error"]
    monkeypatch.setattr(control, "REQUEST_S", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        assert "timed out" in json.loads(connection.makefile("rb").readline())["error"]


def test_more_callers_than_allowed_are_turned_away(server: ControlServer) -> None:
    callers = [threading.Thread(target=lambda: call(address(server), "slow")) for _ in range(control.MAX_CALLERS)]
    for caller in callers:
        caller.start()
    time.sleep(0.2)
    with pytest.raises(ApplyError, match=r"closed|broke"):
        call(address(server), "echo")
    for caller in callers:
        caller.join()
    assert call(address(server), "echo", value=3)["echo"] == 3


def test_nobody_listening_is_an_apply_error_and_a_bad_address_an_input_error(server: ControlServer) -> None:
    server.close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    with pytest.raises(ApplyError, match="no deployment answers"):
        call(f"127.0.0.1:{free}", "echo")
    for text in ("", "localhost", "a:b", ":80", "host:0", "host:65536", "host:-1", "host:８０"):
        with pytest.raises(InputError, match="HOST:PORT"):
            parse_address(text)
    assert parse_address("[::1]:80") == ("::1", 80)


def test_another_service_on_the_port_is_named_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ApplyError, match="another service"):
            call(f"127.0.0.1:{other.getsockname()[1]}", "echo")
        thread.join()


def test_other_machines_need_a_token_and_a_taken_port_is_named() -> None:
    with pytest.raises(InputError, match="needs a token"):
        ControlServer("0.0.0.0", 0, echo)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="cannot be bound"):
        ControlServer("127.0.0.1", taken.getsockname()[1], echo)
