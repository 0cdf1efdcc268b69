"""A Hugging Face Hub on this machine, in memory: the real client talks to it, tests fill it and look inside.

    sha = hub.put("me/model", {"config.json": b"{}"})      # a commit; "datasets/me/words" is a dataset
    hub.files("me/model", sha)                             # {"config.json": b"{}"}
    hub.fail(next=2, path="/commit/", status=503)          # the next two answers to such paths
    hub.truncate("model.safetensors", after_bytes=100)     # the connection breaks there, until hub.heal()
    hub.requests                                           # what the client asked, in order

Answers follow what `huggingface_hub` 1.33 and 2.4 read: statuses, X-Error-Code, X-Repo-Commit, the redirect of large
files to another host (here `localhost` instead of `127.0.0.1`), and so on. Xet is not spoken: a client that has hf_xet
uploads by it without asking, so `HF_HUB_DISABLE_XET` must be set, as `environment` does.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import importlib.util
import ipaddress
import json
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import huggingface_hub
import pytest
import transformers
import yaml
from huggingface_hub import constants

LARGE_FILES = (".safetensors", ".bin", ".pt", ".npy", ".npz", ".onnx", ".parquet", ".zip")
LARGE_SIZE = 10_000_000


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of the log: what was asked and the status that was answered (`None`: the connection broke)."""

    method: str
    path: str
    token: str | None
    range: str | None
    status: int | None


@dataclasses.dataclass(frozen=True)
class Commit:
    files: dict[str, bytes]
    title: str
    parent: str | None
    date: str


@dataclasses.dataclass
class Repo:
    """Commits by hash, and what names them. A pull request is the branch `refs/pr/1`."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: dict[str, bytes], title: str, branch: str = "main", parent: str | None = None) -> str:
        """Makes `files`, all of them, the newest commit of `branch`, and returns its hash."""
        parent = parent or self.branches.get(branch)
        named = json.dumps([len(self.commits), parent, title, sorted((path, git_id(files[path])) for path in files)])
        sha = hashlib.sha1(named.encode()).hexdigest()
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.commits[sha] = Commit(dict(files), title, parent, date)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit hash that a branch, a tag or a full hash stands for."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next `left` requests (`None`: with all) whose path contains `path`."""

    kind: str
    path: str
    left: int | None
    method: str | None = None
    value: Any = None


class Refusal(Exception):
    """An answer that is an error, with the headers by which the client tells its kind."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclasses.dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    first_byte: int = 0
    """Where in its file `body` starts."""
    is_file: bool = False


class LoopbackHub:
    """The server; a context manager that starts and stops it.

    Attributes:
        url: the endpoint.
        repos: repositories by name (`"me/model"`, `"datasets/me/words"`).
        tokens: user and role (`"write"`, `"read"` or `"revoked"`) by token. `token` may write as the user `me`.
        blobs: what was uploaded as large files, by sha256, committed or not.
        requests: the log.
    """

    token = "hf_write"
    read_token = "hf_read"
    stranger_token = "hf_stranger"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = {
            self.token: ("me", "write"),
            self.read_token: ("me", "read"),
            self.stranger_token: ("stranger", "write"),
        }
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.crashes: list[str] = []
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._server: http.server.ThreadingHTTPServer | None = None
        self._port = 0

    def __enter__(self) -> LoopbackHub:
        self.online()
        return self

    def __exit__(self, *error: object) -> None:
        self.offline()
        assert not self.crashes, "LoopbackHub itself failed:\n" + "\n".join(self.crashes)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def online(self) -> None:
        """Answers again, at the same address."""
        if self._server is None:
            handler = type("Handler", (_Handler,), {"hub": self})
            self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), handler)
            self._port = self._server.server_address[1]
            threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def offline(self) -> None:
        """Refuses every connection, as a machine without a network does."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def put(self, repo_id: str, files: dict[str, bytes], revision: str = "main", *, keep: bool = True) -> str:
        """Commits `files` to a branch, past all checks; the repository and the branch are made if there are none.

        Args:
            keep: whether the files that the branch has already stay.

        Returns:
            The commit's hash.
        """
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo())
            start = repo.branches.get(revision) or repo.branches.get("main")
            before = repo.commits[start].files if start and keep else {}
            self.blobs |= {sha256(body): body for body in files.values()}
            return repo.commit({**before, **files}, "put", revision, parent=start)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a commit."""
        with self.lock:
            repo = self.repos[repo_id]
            return dict(repo.commits[repo.resolve(revision)].files)

    def head(self, repo_id: str, branch: str = "main") -> str:
        """The hash of a branch's newest commit."""
        return self.repos[repo_id].branches[branch]

    def revoke(self, token: str) -> None:
        """From here on, requests with `token` are refused, for public repositories too."""
        self.tokens[token] = (self.tokens[token][0], "revoked")

    def fail(self, next: int | None = 1, path: str = "", status: int = 503, method: str | None = None) -> None:
        """Answers `status` to the next requests (`None`: to all) whose path contains `path`. The client repeats some of
        its requests up to five times, so `next=1` may be no more than a hiccup."""
        self._faults.append(Fault("fail", path, next, method, status))

    def truncate(self, path: str, after_bytes: int, next: int | None = None) -> None:
        """Breaks the connection once `after_bytes` of a file were sent, or of an upload received. Large files are
        uploaded to `/lfs/<repository>/<sha256>`, commits to `/api/models/<repository>/commit/<branch>`."""
        self._faults.append(Fault("truncate", path, next, None, after_bytes))

    def forge(self, path: str, body: bytes) -> None:
        """Sends `body` as the content of files whose `repository/file` contains `path`; the size and the hash that the
        client is told before stay the true ones."""
        self._faults.append(Fault("forge", path, None, None, body))

    def heal(self) -> None:
        """Ends what `fail`, `truncate` and `forge` began."""
        self._faults.clear()

    def fault(self, kind: str, path: str, method: str | None = None) -> Any:
        """The value of the first fault that applies, which counts as one more request; `None` without one."""
        with self.lock:
            for fault in self._faults:
                matches = fault.kind == kind and fault.path in path and fault.method in (None, method)
                if matches and fault.left != 0:
                    fault.left = None if fault.left is None else fault.left - 1
                    return fault.value
        return None

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables that point a new process at this hub, with its cache and token below `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_TOKEN": self.token,
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HUGGINGFACE_CO_STAGING": "0",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "*",
            "no_proxy": "*",
        }


def connect_client(hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points `huggingface_hub` and `transformers`, imported already, at `hub`, as if started with its environment."""
    for name, value in hub.environment(home).items():
        monkeypatch.setenv(name, value)
    # The client reads the environment into constants once, at import: they are computed a second time and carried over.
    spec = importlib.util.find_spec("huggingface_hub.constants")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    plain = (str, int, float, bool, frozenset, type(None))
    old = {name: value for name, value in vars(constants).items() if name.isupper() and isinstance(value, plain)}
    changed = {name for name, value in old.items() if vars(fresh)[name] != value}
    for module in _client_modules():
        for name in changed & vars(module).keys():
            if vars(module)[name] == old[name]:
                monkeypatch.setattr(module, name, vars(fresh)[name])
        for value in list(vars(module).values()):
            if isinstance(value, huggingface_hub.HfApi):
                monkeypatch.setattr(value, "endpoint", hub.url)
    # Made when first needed, with the endpoint of then: it must not outlive this test.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    # The client waits for seconds before it repeats a request.
    nap = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: nap(min(seconds, 0.01)))
    # A client of before has its proxies from the old environment.
    huggingface_hub.close_session()


def _client_modules() -> list[Any]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in ("huggingface_hub", "transformers", "vwt_hf")
    ]


@contextlib.contextmanager
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets this process reach no address but the loopback; fails at the end if it tried, whoever caught the error."""
    strays: list[str] = []

    def check(host: Any) -> None:
        host = host.decode() if isinstance(host, bytes) else host
        with contextlib.suppress(ValueError):
            if host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback:
                return
        strays.append(str(host))
        raise AssertionError(f"a test tried to reach {host}")

    def look_up(host: Any, *args: Any, _original: Any = socket.getaddrinfo, **kwargs: Any) -> Any:
        check(host)
        return _original(host, *args, **kwargs)

    def connect(self: socket.socket, address: Any, _original: Any = socket.socket.connect) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            check(address[0])
        _original(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", connect)
    yield
    assert not strays, f"the test tried to reach {strays}"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Reads a request, finds its route, answers; one connection each, so that `offline` has none to cut."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            body = self._read_body(path)
            answer = self._answer(path, body)
        except _Broken:
            self._log(path, None)
            self.close_connection = True
            return
        self._log(path, answer.status)
        with contextlib.suppress(ConnectionError):  # the client may have given up
            self._send(path, answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _log(self, path: str, status: int | None) -> None:
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, self._token(), self.headers.get("Range"), status))

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _read_body(self, path: str) -> bytes:
        """The request's body. All of it is read before anything is answered, or the client would see a reset."""
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        length = int(self.headers.get("Content-Length", 0))
        if not chunked and not length:
            return b""
        limit = self.hub.fault("truncate", path, self.command)
        if limit is not None and (chunked or limit < length):
            self.rfile.read(min(limit, length))
            raise _Broken
        if not chunked:
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, path: str, body: bytes) -> Answer:
        try:
            status = self.hub.fault("fail", path, self.command)
            if status is not None:
                raise Refusal(status, f"LoopbackHub was told to answer {status}")
            with self.hub.lock:
                return self._route(body)
        except Refusal as refusal:
            error = json.dumps({"error": refusal.message}).encode()
            return Answer(refusal.status, error, {"Content-Type": "application/json", **refusal.headers})
        except Exception:
            self.hub.crashes.append(f"{self.command} {self.path}\n{traceback.format_exc()}")
            return Answer(500, b"LoopbackHub crashed")

    def _route(self, body: bytes) -> Answer:
        url = urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and method == route_method:
                query = {name: values[-1] for name, values in parse_qs(url.query).items()}
                call = Call(self.hub, self.command, self._token(), query, body, self.headers)
                result = handle(call, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                if isinstance(result, Answer):
                    return result
                return Answer(200, json.dumps(result).encode(), {"Content-Type": "application/json"})
        # What has no route is, to the client, mostly a repository of a name that no repository has.
        raise Refusal(404, f"Nothing is at {self.command} {self.path}", "RepoNotFound")

    def _send(self, path: str, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        body = answer.body
        if answer.is_file:
            limit = self.hub.fault("truncate", path, self.command)
            if limit is not None:
                body = body[: max(0, limit - answer.first_byte)]
        self.wfile.write(body)


class _Broken(Exception):
    """The connection breaks here."""


@dataclasses.dataclass
class Call:
    """A request as a route sees it."""

    hub: LoopbackHub
    method: str
    token: str | None
    query: dict[str, str]
    body: bytes
    headers: Any

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def caller(self) -> tuple[str | None, str]:
        """User and role behind the token; no user without a token."""
        if self.token is None:
            return None, "read"
        user, role = self.hub.tokens.get(self.token, ("", "revoked"))
        if role == "revoked":
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user, role

    def readable(self, repo_id: str, content: bool = False) -> Repo:
        """The repository, if the caller may know of it and, with `content`, may read its files."""
        user, _ = self.caller()
        repo = self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[-2] if "/" in repo_id else None
        if repo is None or (repo.private and user != owner):
            # Without the code, the client takes a 401 for a missing repository at https:// addresses only.
            if user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if content and repo.gated and user != owner:
            raise Refusal(403 if user else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repo

    def writable(self, repo_id: str) -> Repo:
        repo = self.readable(repo_id)
        self.must_write_as(repo_id.split("/")[-2])
        return repo

    def must_write_as(self, namespace: str) -> None:
        user, role = self.caller()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if role != "write" or user != namespace:
            raise Refusal(403, f"You don't have the rights to write to the namespace {namespace}")


def git_id(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LARGE_FILES) or size > LARGE_SIZE)


def entry(path: str, body: bytes) -> dict[str, Any]:
    """A file as listings show it."""
    if not is_large(path, len(body)):
        return {"type": "file", "path": path, "size": len(body), "oid": git_id(body)}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(body)}\nsize {len(body)}\n".encode()
    large = {"oid": sha256(body), "size": len(body), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(body), "oid": git_id(pointer), "lfs": large}


def front_matter(text: str) -> Any:
    """The YAML between the `---` lines that a card begins with, `None` without any."""
    match = re.match(r"---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(match[1]) if match else None


def who_am_i(call: Call) -> dict[str, Any]:
    user, role = call.caller()
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    token = {"displayName": "loopback", "role": role}
    return {"type": "user", "id": user, "name": user, "orgs": [], "auth": {"accessToken": token}}


def create_repo(call: Call) -> Answer:
    asked = call.json()
    namespace = asked.get("organization") or call.caller()[0]
    repo_id = named(asked, namespace)
    call.must_write_as(namespace)
    address = {"url": f"{call.hub.url}/{repo_id}", "name": f"{namespace}/{asked['name']}"}
    if repo_id in call.hub.repos:
        error = {"error": f"You already created this repo: {repo_id}", **address}
        return Answer(409, json.dumps(error).encode(), {"Content-Type": "application/json"})
    repo = call.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
    repo.commit({}, "initial commit")
    return Answer(200, json.dumps(address).encode(), {"Content-Type": "application/json"})


def delete_repo(call: Call) -> Answer:
    asked = call.json()
    repo_id = named(asked, asked.get("organization") or call.caller()[0])
    call.writable(repo_id)
    del call.hub.repos[repo_id]
    return Answer()


def named(asked: dict[str, Any], namespace: str | None) -> str:
    prefix = "" if asked.get("type") in (None, "model") else f"{asked['type']}s/"
    return f"{prefix}{namespace}/{asked['name']}"


def change_settings(call: Call, repo: str) -> dict[str, Any]:
    asked, found = call.json(), call.writable(key(repo))
    found.private = asked.get("visibility", "private" if found.private else "public") == "private"
    found.gated = bool(asked.get("gated", found.gated))
    return {}


def key(repo: str) -> str:
    """A repository's name here, from its path below `/api/`: models have no prefix."""
    return repo.removeprefix("models/")


def repo_info(call: Call, repo: str, revision: str = "main") -> dict[str, Any]:
    found = call.readable(key(repo))
    sha = found.resolve(revision)
    files = found.commits[sha].files
    card = {}
    with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
        card = front_matter(files.get("README.md", b"").decode()) or {}
    siblings = [{"rfilename": path} for path in sorted(files)]
    if call.query.get("blobs"):
        for sibling in siblings:
            shown = entry(sibling["rfilename"], files[sibling["rfilename"]])
            sibling |= {"size": shown["size"], "blobId": shown["oid"]}
            if "lfs" in shown:
                sibling["lfs"] = {"sha256": shown["lfs"]["oid"], **shown["lfs"]}
    name = "/".join(repo.split("/")[1:])
    return {
        "_id": git_id(repo.encode())[:24],
        "id": name,
        "modelId": name,
        "author": name.split("/")[0],
        "sha": sha,
        "lastModified": found.commits[sha].date,
        "createdAt": next(iter(found.commits.values())).date,
        "private": found.private,
        "gated": "auto" if found.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags") or [],
        "library_name": card.get("library_name"),
        "cardData": card,
        "siblings": siblings,
    }


def list_tree(call: Call, repo: str, revision: str, folder: str = "") -> list[dict[str, Any]]:
    found = call.readable(key(repo), content=True)
    files = found.commits[found.resolve(revision)].files
    start = f"{folder}/" if folder else ""
    inside = {path: files[path] for path in sorted(files) if path.startswith(start)}
    if folder and not inside:
        raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    shown, folders = [], set()
    for path, body in inside.items():
        parts = path.removeprefix(start).split("/")
        folders |= {start + "/".join(parts[:depth]) for depth in range(1, len(parts))}
        if len(parts) == 1 or call.query.get("recursive", "").lower() == "true":
            shown.append(entry(path, body))
    if call.query.get("recursive", "").lower() != "true":
        folders = {name for name in folders if "/" not in name.removeprefix(start)}
    directories = [{"type": "directory", "path": name, "size": 0, "oid": git_id(name.encode())} for name in folders]
    return sorted(directories, key=lambda directory: directory["path"]) + shown


def paths_info(call: Call, repo: str, revision: str) -> list[dict[str, Any]]:
    found = call.readable(key(repo), content=True)
    files = found.commits[found.resolve(revision)].files
    asked = parse_qs(call.body.decode()).get("paths", [])
    return [entry(path, files[path]) for path in asked if path in files]


def list_refs(call: Call, repo: str) -> dict[str, Any]:
    found = call.readable(key(repo))

    def shown(refs: dict[str, str], start: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": start + name, "targetCommit": sha} for name, sha in refs.items()]

    branches = {name: sha for name, sha in found.branches.items() if not name.startswith("refs/")}
    pulls = {name: sha for name, sha in found.branches.items() if name.startswith("refs/")}
    return {
        "branches": shown(branches, "refs/heads/"),
        "tags": shown(found.tags, "refs/tags/"),
        "converts": [],
        "pullRequests": shown(pulls, ""),
    }


def list_commits(call: Call, repo: str, revision: str) -> list[dict[str, Any]]:
    found = call.readable(key(repo))
    sha: str | None = found.resolve(revision)
    shown = []
    while sha is not None:
        commit = found.commits[sha]
        shown.append(
            {"id": sha, "title": commit.title, "message": "", "authors": [{"user": "me"}], "date": commit.date}
        )
        sha = commit.parent
    return shown


def create_branch(call: Call, repo: str, branch: str) -> dict[str, Any]:
    found = call.writable(key(repo))
    if branch in found.branches:
        raise Refusal(409, f"Reference already exists: {branch}")
    found.branches[branch] = found.resolve(call.json().get("startingPoint") or "main")
    return {}


def create_tag(call: Call, repo: str, revision: str) -> dict[str, Any]:
    found, tag = call.writable(key(repo)), call.json()["tag"]
    if tag in found.tags:
        raise Refusal(409, f"Tag already exists: {tag}")
    found.tags[tag] = found.resolve(revision)
    return {}


def delete_ref(call: Call, repo: str, kind: str, name: str) -> dict[str, Any]:
    found = call.writable(key(repo))
    refs = found.branches if kind == "branch" else found.tags
    if refs.pop(name, None) is None:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return {}


def validate_yaml(call: Call) -> Answer:
    errors, warnings = [], []
    try:
        card = front_matter(call.json()["content"])
        if not card:
            warnings = [{"message": "empty or missing yaml metadata in repo card"}]
        elif not isinstance(card, dict):
            errors = [{"message": "the metadata is not a mapping"}]
    except yaml.YAMLError as error:
        errors = [{"message": str(error)}]
    answer = json.dumps({"errors": errors, "warnings": warnings}).encode()
    return Answer(400 if errors else 200, answer, {"Content-Type": "application/json"})


def preupload(call: Call, repo: str, revision: str) -> dict[str, Any]:
    # Whoever may read may open a pull request.
    may = call.readable if call.query.get("create_pr") == "1" else call.writable
    found = may(key(repo))
    files = found.commits[found.resolve(revision)].files
    shown = []
    for asked in call.json()["files"]:
        large, body = is_large(asked["path"], asked["size"]), files.get(asked["path"])
        there = None if body is None else sha256(body) if large else git_id(body)
        mode = "lfs" if large else "regular"
        shown.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there})
    return {"files": shown}


def offer_uploads(call: Call, repo: str) -> dict[str, Any]:
    offered = call.json()
    # Uploads for a pull request name no branch.
    may = call.writable if "ref" in offered else call.readable
    may(repo)
    objects = []
    for asked in offered["objects"]:
        offer = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in call.hub.blobs:
            upload = {"href": f"{call.hub.url}/lfs/{quote(repo)}/{asked['oid']}"}
            verify = {"href": f"{call.hub.url}/lfs/{quote(repo)}/verify"}
            offer["actions"] = {"upload": upload, "verify": verify}
        objects.append(offer)
    return {"transfer": "basic", "objects": objects}


def receive_blob(call: Call, repo: str, oid: str) -> Answer:
    if sha256(call.body) != oid:
        raise Refusal(400, f"The content is not that of {oid}")
    call.hub.blobs[oid] = call.body
    return Answer()


def verify_blob(call: Call, repo: str) -> dict[str, Any]:
    asked = call.json()
    if len(call.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
        raise Refusal(404, f"No object {asked['oid']} of {asked['size']} bytes was uploaded")
    return {}


def receive_commit(call: Call, repo: str, revision: str) -> dict[str, Any]:
    """Applies all operations, or, if one of them cannot be, none."""
    is_pull = call.query.get("create_pr") == "1"
    name = key(repo)
    found = call.readable(name, content=True) if is_pull else call.writable(name)
    parent = found.resolve(revision)
    files, header = dict(found.commits[parent].files), {}
    for line in call.body.splitlines():
        operation = json.loads(line)
        kind, value = operation["key"], operation["value"]
        if kind == "header":
            header = value
        elif kind == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            if value["oid"] not in call.hub.blobs:
                raise Refusal(400, f"{value['path']} points to {value['oid']}, which was never uploaded")
            files[value["path"]] = call.hub.blobs[value["oid"]]
        else:
            gone = [path for path in files if path == value["path"] or path.startswith(value["path"].rstrip("/") + "/")]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            files = {path: body for path, body in files.items() if path not in gone}
    if header.get("parentCommit") not in (None, parent):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    pulls = sum(branch.startswith("refs/pr/") for branch in found.branches)
    branch = f"refs/pr/{pulls + 1}" if is_pull else revision
    sha = found.commit(files, header.get("summary", ""), branch, parent)
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{call.hub.url}/{name}/commit/{sha}"}
    if is_pull:
        answer["pullRequestUrl"] = f"{call.hub.url}/{name}/discussions/{pulls + 1}"
    return answer


def resolve_file(call: Call, repo: str, revision: str, path: str) -> Answer:
    found = call.readable(repo, content=True)
    sha = found.resolve(revision)
    body = found.commits[sha].files.get(path)
    if body is None:
        raise Refusal(404, f"Entry not found: {path}", "EntryNotFound", **{"X-Repo-Commit": sha})
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{git_id(body)}"'}
    if not is_large(path, len(body)):
        return send_file(call, f"/{repo}/{path}", body, headers)
    headers |= {"X-Linked-Size": str(len(body)), "X-Linked-ETag": f'"{sha256(body)}"'}
    headers["Location"] = f"http://localhost:{call.hub._port}/cdn/{quote(repo)}/{sha256(body)}/{quote(path)}"
    return Answer(302, b"Found", headers)


def send_blob(call: Call, repo: str, oid: str, path: str) -> Answer:
    return send_file(call, f"/{repo}/{path}", call.hub.blobs[oid], {"Accept-Ranges": "bytes", "ETag": f'"{oid}"'})


def send_file(call: Call, path: str, body: bytes, headers: dict[str, str]) -> Answer:
    """A file, or the range of it that was asked for."""
    if call.method == "GET":
        forged = call.hub.fault("forge", path, call.method)
        body = body if forged is None else forged
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range") or "")
    if not match or match.groups() == ("", ""):
        return Answer(200, body, headers, is_file=True)
    first, last = match.groups()
    start = int(first) if first else max(0, len(body) - int(last))
    end = min(int(last) + 1, len(body)) if first and last else len(body)
    if start >= end:
        raise Refusal(416, "Requested range not satisfiable", **{"Content-Range": f"bytes */{len(body)}"})
    headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
    return Answer(206, body[start:end], headers, start, is_file=True)


_API = "/api/(?P<repo>(?:models|datasets|spaces)/[^/]+/[^/]+)"
_REPO = "(?P<repo>(?:(?:datasets|spaces)/)?[^/]+/[^/]+)"
_REVISION = "(?P<revision>[^/]+)"

ROUTES = (
    ("GET", "/api/whoami-v2", who_am_i),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", _API, repo_info),
    ("GET", f"{_API}/revision/{_REVISION}", repo_info),
    ("GET", f"{_API}/tree/{_REVISION}(?:/(?P<folder>.+))?", list_tree),
    ("POST", f"{_API}/paths-info/{_REVISION}", paths_info),
    ("GET", f"{_API}/refs", list_refs),
    ("GET", f"{_API}/commits/{_REVISION}", list_commits),
    ("PUT", f"{_API}/settings", change_settings),
    ("POST", f"{_API}/branch/(?P<branch>[^/]+)", create_branch),
    ("POST", f"{_API}/tag/{_REVISION}", create_tag),
    ("DELETE", f"{_API}/(?P<kind>branch|tag)/(?P<name>[^/]+)", delete_ref),
    ("POST", f"{_API}/preupload/{_REVISION}", preupload),
    ("POST", f"{_API}/commit/{_REVISION}", receive_commit),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", offer_uploads),
    ("POST", f"/lfs/{_REPO}/verify", verify_blob),
    ("PUT", f"/lfs/{_REPO}/(?P<oid>[0-9a-f]{{64}})", receive_blob),
    ("GET", f"/cdn/{_REPO}/(?P<oid>[0-9a-f]{{64}})/(?P<path>.+)", send_blob),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", resolve_file),
)
