"""The server against its own description: requests that schemathesis makes of /openapi.json, good ones and bad."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from support.live_server import LiveServer

# Not positive_data_acceptance: what a schema cannot say (roles in turn, tokens of the vocabulary) is refused, too.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance"
)


def test_what_schemathesis_sends_is_answered_as_the_schema_says(server: LiveServer, tmp_path: Path) -> None:
    if importlib.util.find_spec("schemathesis") is None:  # its import exchanges this process's hypothesis settings
        pytest.skip("needs schemathesis")
    program = Path(sys.executable).with_name("st")
    options = ["--checks", CHECKS, "--max-examples", "15", "--seed", "1", "--request-timeout", "60", "--no-shrink"]
    command = [str(program), "run", f"{server.url}/openapi.json", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout
