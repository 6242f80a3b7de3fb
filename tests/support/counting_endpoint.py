"""A model behind OpenAI's chat and batch protocols that counts what it is asked, and misbehaves where a test says so.

What it says follows from the request alone, so equal runs get equal replies. It can be a process of its own:
``python -m support.counting_endpoint PORT LOG [SECONDS]`` writes a line for each reply, paid for from then.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Misbehave = Callable[[Body], tuple[int, dict[str, str], str] | None]

_WORDS = ("river", "stone", "garden", "engine", "letter", "mirror", "market", "winter", "signal", "bridge", "colour")


class CountingEndpoint:
    """The endpoint.

    Args:
        seconds: that a reply takes.
        port: 0: any.

    Attributes:
        misbehave: makes (status, headers, text) of a request, or None: it is answered as it should be. A header
            ``reset`` breaks the connection, ``again`` sends the text without end, every so many seconds.
        answered: requests by digest, that a reply was made for: what one pays for.
        seen: all bodies.
        read, written: tokens of all replies, as told to the client.
        most: requests that were under way at once.
        batches: by id; ``batch_rounds`` is how often one is polled before it is over, ``batch_loses`` says which of its
            requests get no reply.
    """

    def __init__(self, seconds: float = 0.0, port: int = 0, log: str | None = None) -> None:
        self.misbehave: Misbehave = lambda body: None
        self.answered: Counter[str] = Counter()
        self.seen: list[Body] = []
        self.keys: list[str] = []
        self.read = self.written = self.most = self.running = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.batch_rounds = 1
        self.batch_loses: Callable[[str], bool] = lambda key: False
        self.lock = threading.Lock()
        self._seconds = seconds
        self._log = open(log, "a", buffering=1) if log else None  # noqa: SIM115, PTH123  as long as the process
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                endpoint.keys.append(self.headers.get("Authorization", ""))
                content = self.rfile.read(int(self.headers["Content-Length"]))
                self._send(*endpoint.post(self.path, content))

            def do_GET(self) -> None:
                self._send(*endpoint.get(self.path))

            def _send(self, status: int, headers: dict[str, str], text: str) -> None:
                if headers.get("reset"):
                    self.close_connection = True
                    return
                payload = text.encode("latin-1" if "Content-Encoding" in headers else "utf-8")
                self.send_response(status)
                again = headers.get("again")
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    if name != "again":
                        self.send_header(name, value)
                if again is not None:
                    self.end_headers()
                    while True:  # until the client is gone
                        self.wfile.write(payload)
                        time.sleep(float(again))
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Clients are killed here on purpose."""

        self.http = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def post(self, path: str, content: bytes) -> tuple[int, dict[str, str], str]:
        if path.endswith("/files"):
            return self._upload(content)
        body = json.loads(content)
        if path.endswith("/batches"):
            return self._make_batch(body)
        with self.lock:
            self.seen.append(body)
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            if (wrong := self.misbehave(body)) is not None:
                return wrong
            time.sleep(self._seconds)
            return 200, {}, json.dumps(self.reply(body))
        finally:
            with self.lock:
                self.running -= 1

    def get(self, path: str) -> tuple[int, dict[str, str], str]:
        if (content := re.search(r"/files/([\w-]+)/content", path)) is not None:
            return 200, {}, self.files[content[1]].decode()
        if (one := re.search(r"/batches/([\w-]+)", path)) is not None:
            return 200, {}, json.dumps(self._look_at(self.batches[one[1]]))
        return 200, {}, json.dumps({"object": "list", "data": list(self.batches.values()), "has_more": False})

    def reply(self, body: Body) -> Body:
        """What the model says to a request, which is paid for from here on."""
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        text = said(body)
        read = sum(len(message["content"].split()) for message in body["messages"])
        written = len(text.split())
        with self.lock:
            self.answered[digest] += 1
            self.read += read
            self.written += written
        if self._log is not None:
            self._log.write(f"{digest} {read} {written}\n")
        return chat(text, read, written)

    def _upload(self, content: bytes) -> tuple[int, dict[str, str], str]:
        found = re.search(rb'filename="([\w.-]+)"\r\n.*?\r\n\r\n(.*)\r\n--', content, re.DOTALL)
        assert found is not None
        name = f"file-{len(self.files)}"
        self.files[name] = found[2]
        about = {"id": name, "object": "file", "bytes": len(found[2]), "created_at": 0, "filename": "f"}
        return 200, {}, json.dumps({**about, "purpose": "batch", "status": "processed"})

    def _make_batch(self, body: Body) -> tuple[int, dict[str, str], str]:
        name = f"batch-{len(self.batches)}"
        batch = {"id": name, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"]}
        batch |= {"completion_window": "24h", "created_at": 0, "status": "in_progress", "metadata": body["metadata"]}
        self.batches[name] = {**batch, "output_file_id": None, "error_file_id": None, "polled": 0}
        return 200, {}, json.dumps(batch)

    def _look_at(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["polled"] += 1
        if batch["status"] == "in_progress" and batch["polled"] > self.batch_rounds:
            lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
            random.Random(0).shuffle(lines)  # the order is not kept
            rows = []
            for line in lines:
                if not self.batch_loses(line["custom_id"]):
                    response = {"status_code": 200, "request_id": "r", "body": self.reply(line["body"])}
                    rows.append({"id": "x", "custom_id": line["custom_id"], "response": response, "error": None})
            batch["output_file_id"] = f"file-{len(self.files)}"
            self.files[batch["output_file_id"]] = "".join(json.dumps(row) + "\n" for row in rows).encode()
            batch["status"] = "completed"
        return batch


def chat(text: str | None, read: int = 5, written: int = 5, finish: str = "stop") -> Body:
    """A body of OpenAI's chat protocol."""
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "served-1",
        "system_fingerprint": "fp",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def said(body: Body) -> str:
    """Lists in the form that the schema has, or as lines; otherwise a text: all made of the request's digest."""
    draw = random.Random(json.dumps(body, sort_keys=True))
    prompt = "\n".join(message["content"] for message in body["messages"])
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {}).get("properties", {})
    items = schema.get("items", {})
    if items:
        number = items["maxItems"]
        if items["items"]["type"] == "object":
            return json.dumps({"items": [{"name": _some(draw, 2), "about": _some(draw, 5)} for _ in range(number)]})
        return json.dumps({"items": [_some(draw, 9) for _ in range(number)]})
    if (lines := re.search(r"Answer with (\d+) lines", prompt)) is not None:
        return "\n".join(f"{place}. {_some(draw, 2)}: {_some(draw, 5)}." for place in range(1, int(lines[1]) + 1))
    wanted = re.search(r"rite (\d+) (?:different|new) instr", prompt)
    if "three dashes" in prompt and wanted is not None:
        return "\n---\n".join(_some(draw, 9) for _ in range(int(wanted[1])))
    return _some(draw, 12)


def _some(draw: random.Random, words: int) -> str:
    text = " ".join(draw.choice(_WORDS) for _ in range(words))
    return f"{text.capitalize()} {draw.randrange(10**6)}"


if __name__ == "__main__":
    serving = CountingEndpoint(float(sys.argv[3]) if len(sys.argv) > 3 else 0.0, int(sys.argv[1]), sys.argv[2])
    print(serving.url, flush=True)
    threading.Event().wait()
