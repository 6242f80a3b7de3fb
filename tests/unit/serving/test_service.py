"""The server as a service: what the unit of examples/serving starts, told when it is ready, ended by SIGTERM."""

from __future__ import annotations

import shlex
import socket
from configparser import RawConfigParser
from http.client import HTTPConnection
from pathlib import Path

import pytest
from server_process import running

UNIT = Path(__file__).parents[3] / "examples" / "serving" / "ultrafuser@.service"


def test_the_units_command_serves_with_the_keys_it_was_given(
    releases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = RawConfigParser(strict=False, delimiters="=")
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT)
    program, what, model, *options = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("/ultrafuser") and (what, model) == ("serve", "/srv/models/%i")
    assert options.pop() == "$OPTIONS"
    (tmp_path / "keys").write_text("sesame")
    options = [option.replace("${CREDENTIALS_DIRECTORY}", str(tmp_path)) for option in options]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with running(str(releases["llamas"]), *options) as server:
            assert manager.recv(100) == b"READY=1"
            assert unit["Service"]["Type"] == "notify"
            for key, status in (("sesame", 200), ("other", 401)):
                connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
                connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
                assert connection.getresponse().status == status
                connection.close()
            assert server.end() == 0
            assert manager.recv(100) == b"STOPPING=1"
