"""A server on the loopback address that speaks as much of the hub's API as fetching and pushing need."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "c" * 40
LARGE = 10_000  # bytes of a file that is pushed by itself


@dataclass
class Hub:
    """repos: {"models/org/name": {file: bytes}}. asked: every request. breaks: bytes after which the next answer that
    is longer breaks off. lies: files that are said to have one byte more. gated, private: repositories that are."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    breaks: int = 0
    lies: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    url: str = ""

    def add(self, repo: str, folder: Path, kind: str = "models") -> None:
        """A repository with all files below a folder."""
        files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
        self.repos[f"{kind}/{repo}"] = files


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code, Content_Type="application/json")

        def say(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0])
            hub.asked.append(f"{self.command} {path}")
            api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
            if api:
                return self.info(*api.groups())
            tree = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)", path)
            if tree:
                files = hub.repos[f"{tree[1]}/{tree[2]}"]
                return self.say([{"type": "file", "path": n, "size": len(d), "oid": sha(d)} for n, d in files.items()])
            file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if file:
                return self.file("datasets" if file[1] else "models", *file.groups()[1:])
            self.refuse(404, "EntryNotFound")

        def info(self, kind: str, repo: str, revision: str | None) -> None:
            if f"{kind}/{repo}" in hub.gated:
                return self.refuse(403, "GatedRepo")
            if f"{kind}/{repo}" not in hub.repos:
                return self.refuse(401, "RepoNotFound")
            if revision not in (None, "main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            files = hub.repos[f"{kind}/{repo}"]
            siblings = [{"rfilename": name, "size": len(data), "blobId": sha(data)} for name, data in files.items()]
            self.say({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0})

        def file(self, kind: str, repo: str, revision: str, name: str) -> None:
            files = hub.repos.get(f"{kind}/{repo}", {})
            if name not in files:
                return self.refuse(404, "EntryNotFound" if files else "RepoNotFound")
            data, known = (
                files[name],
                {"ETag": f'"{sha(files[name])}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"},
            )
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            first = int(wanted[1]) if wanted else 0
            last = min(int(wanted[2]) if wanted and wanted[2] else len(data) - 1, len(data) - 1)
            part = data[first : last + 1]
            if wanted:
                known["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            if self.command == "HEAD":
                size = len(data) + (name in hub.lies)
                self.send_response(200)
                for key, value in {**known, "Content-Length": str(size)}.items():
                    self.send_header(key.replace("_", "-"), value)
                return self.end_headers()
            hub.sent[name] = hub.sent.get(name, 0) + len(part)
            if hub.breaks and len(part) > hub.breaks:
                part, hub.breaks, whole = part[: hub.breaks], 0, len(part)
                self.send_response(206 if wanted else 200)
                for key, value in {**known, "Content-Length": str(whole)}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(part)
                self.wfile.flush()
                self.close_connection = True
                return self.connection.close()
            self.answer(206 if wanted else 200, part, **known)

        def do_POST(self) -> None:
            path = unquote(self.path.split("?")[0])
            hub.asked.append(f"POST {path}")
            body = self.body()
            if path == "/api/repos/create":
                said = json.loads(body)
                repo = f"{said.get('organization')}/{said['name']}"
                hub.repos.setdefault(f"{said.get('type', 'model')}s/{repo}", {})
                return self.say({"url": f"{hub.url}/{repo}", "id": repo, "private": said.get("private", False)})
            if path == "/api/validate-yaml":
                return self.say({"errors": [], "warnings": []})
            if path.endswith("/preupload/main"):
                modes = [
                    {"path": f["path"], "uploadMode": "lfs" if f["size"] > LARGE else "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self.say({"files": modes})
            if path.endswith(".git/info/lfs/objects/batch"):
                objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(body)["objects"]]
                for each in objects:
                    each["actions"] = {"upload": {"href": f"{hub.url}/lfs/{each['oid']}", "header": {}}}
                return self.say({"transfer": "basic", "objects": objects})
            commit = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/commit/main", path)
            if commit:
                return self.commit(f"{commit[1]}/{commit[2]}", commit[2], body)
            self.refuse(404, "EntryNotFound")

        def commit(self, key: str, repo: str, body: bytes) -> None:
            for line in body.decode().splitlines():
                said = json.loads(line)
                if said["key"] == "file":
                    hub.repos[key][said["value"]["path"]] = base64.b64decode(said["value"]["content"])
                if said["key"] == "lfsFile":
                    hub.repos[key][said["value"]["path"]] = hub.repos["lfs"][said["value"]["oid"]]
            self.say({"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

        def do_PUT(self) -> None:
            hub.asked.append(f"PUT {self.path}")
            hub.repos.setdefault("lfs", {})[self.path.rpartition("/")[2]] = self.body()
            self.answer(200)

    return Handler


def sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """The server, while this block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
