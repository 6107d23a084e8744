"""A Hub on loopback that serves the folders of one directory: `python hub_server.py DIRECTORY` prints its address."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

MODEL = r"(?P<repository>[\w.-]+/[\w.-]+)"
REVISIONS = ("main", "v1")


def commit(repository: str, revision: str) -> str:
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """Answers huggingface_hub's requests about models: information, lists of files, files, uploads.

    DIRECTORY/org/name/REVISION/ holds the files. Each request is one line of DIRECTORY/requests.txt. Uploads need the
    token `hf_right`.
    """

    root: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        with (self.root / "requests.txt").open("a") as file:
            file.write(f"POST {path}\n")
        if self.headers["Authorization"] != "Bearer hf_right":
            self._refuse(401, "InvalidToken")
        elif path == "/api/repos/create":
            table = json.loads(sent)
            repository = "/".join(filter(None, (table.get("organization"), table["name"])))
            (self.root / repository / "main").mkdir(parents=True)
            (self.root / repository / "private.txt").write_text(
                str(table.get("visibility") == "private" or table.get("private"))
            )
            self._send_json({"url": f"http://{self.headers['Host']}/{repository}", "name": repository})
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif found := re.fullmatch(rf"/api/models/{MODEL}/preupload/main", path):
            names = [each["path"] for each in json.loads(sent)["files"]]
            self._send_json(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        elif found := re.fullmatch(rf"/api/models/{MODEL}/commit/main", path):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    place = self.root / found["repository"] / "main" / line["value"]["path"]
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(base64.b64decode(line["value"]["content"]))
            sha = commit(found["repository"], "main")
            address = f"http://{self.headers['Host']}/{found['repository']}/commit/{sha}"
            self._send_json({"commitUrl": address, "commitOid": sha})
        else:
            self._refuse(404, "RepoNotFound")

    def _send_json(self, table: object) -> None:
        self._send(json.dumps(table).encode(), {"Content-Type": "application/json"}, True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        with (self.root / "requests.txt").open("a") as file:
            file.write(f"{self.command} {path}\n")
        if found := re.fullmatch(rf"/api/models/{MODEL}(/(?P<what>revision|tree)/(?P<revision>[^/]+))?", path):
            if (folder := self._folder(found["repository"], found["revision"] or "main")) is None:
                return
            names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            if found["what"] == "tree":
                files = [
                    {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": name}
                    for name in names
                ]
                self._send(json.dumps(files).encode(), {"Content-Type": "application/json"}, body)
                return
            siblings = [{"rfilename": name} for name in names]
            told = {"id": found["repository"], "sha": commit(found["repository"], folder.name), "siblings": siblings}
            self._send(json.dumps(told).encode(), {"Content-Type": "application/json"}, body)
        elif found := re.fullmatch(rf"/{MODEL}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", path):
            if (folder := self._folder(found["repository"], found["revision"])) is None:
                return
            if not (folder / found["name"]).is_file():
                self._refuse(404, "EntryNotFound")
                return
            content = (folder / found["name"]).read_bytes()
            marks = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            marks["X-Repo-Commit"] = commit(found["repository"], folder.name)
            self._send(content, marks, body)
        else:
            self._refuse(404, "RepoNotFound")

    def _folder(self, repository: str, revision: str) -> Path | None:
        """The files of a revision (a name or a commit); None if the request has been refused."""
        if repository == "org/gated":
            self._refuse(403, "GatedRepo")
            return None
        if not (self.root / repository).is_dir():
            self._refuse(404, "RepoNotFound")
            return None
        for name in REVISIONS:
            if revision in (name, commit(repository, name)) and (self.root / repository / name).is_dir():
                return self.root / repository / name
        self._refuse(404, "RevisionNotFound")
        return None

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, marks: dict[str, str], body: bool) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part:
            content = content[int(part[1]) : int(part[2]) + 1]
            with (self.root / "requests.txt").open("a") as file:
                file.write(f"sent {len(content)} bytes\n")
        self.send_response(206 if part else 200)
        for name, value in {**marks, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    """A server of the directory in a process of its own, and its address."""
    server = subprocess.Popen([sys.executable, __file__, str(directory)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield server.stdout.readline().strip()
    server.kill()
    server.wait()
    server.stdout.close()


def main() -> None:
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
