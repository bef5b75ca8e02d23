"""A FAKE W&B server, so that the real `wandb sync` can read an offline folder with wandb's own reader and upload it somewhere.

It answers the few GraphQL calls a sync makes and keeps what it is sent. Artifacts are refused (tables then still arrive as media files).
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Uploaded:
    """One run as it arrived."""

    about: dict[str, Any] = field(default_factory=dict)
    """Variables of the first `UpsertBucket`: name, groupName, jobType, config, ..."""
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def synced(folder: Path, config: Path) -> Uploaded:
    """Upload one offline run with `wandb sync`; `config` is a folder for wandb's own settings."""
    found = Uploaded()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path.endswith("/graphql"):
                asked = json.loads(body)
                self._send(answer(asked["query"], asked.get("variables") or {}))
                return
            if self.path.endswith("/file_stream"):
                for name, part in json.loads(body).get("files", {}).items():
                    if name == "wandb-history.jsonl":
                        found.history += [json.loads(line) for line in part["content"]]
                    elif name == "wandb-summary.json":
                        found.summary.update(json.loads(part["content"][-1]))
            self._send({})

        def do_GET(self) -> None:
            self.do_POST()

        def do_PUT(self) -> None:
            self.do_POST()

        def _send(self, value: dict[str, Any]) -> None:
            text = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    def answer(query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            found.about = found.about or variables
            bucket = {
                "id": "UnVu",
                "name": variables.get("name"),
                "displayName": variables.get("displayName"),
                "config": "{}",
                "historyLineCount": 0,
            }
            bucket["project"] = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "tester"}}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "RunResumeStatus" in query:
            return {"data": {"model": None}}
        if "ServerFeatures" in query:
            return {"data": {"serverInfo": {"features": []}}}
        return {"errors": [{"message": "the fake has none"}]}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--yes", "--include-synced", str(folder)],
            env=os.environ
            | {
                "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_address[1]}",
                "WANDB_API_KEY": "a" * 40,
                "WANDB_CONFIG_DIR": str(config),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.shutdown()
    assert done.returncode == 0 and "Finished syncing" in done.stderr + done.stdout, done.stderr
    return found
