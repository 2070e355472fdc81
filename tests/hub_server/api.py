"""The Hub's routes, as `huggingface_hub` calls them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import yaml

from .store import LARGE, Account, ApiError, Commit, Entry, Repo


if TYPE_CHECKING:
    from .server import HubServer

DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    token: str | None
    server: HubServer

    @property
    def account(self) -> Account | None:
        return self.server.store.account(self.token)

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


Route = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
_REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
_FILES = r"/(?:(?P<kind>dataset|space)s/)?(?P<name>[^/]+/[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Route], Route]:
    def add(function: Route) -> Route:
        ROUTES.extend((method, re.compile(pattern), function) for method in methods.split())
        return function

    return add


def answer(request: Request) -> Answer:
    for method, pattern, function in ROUTES:
        match = pattern.fullmatch(request.path)
        if method == request.method and match:
            values = {name: unquote(value) if value else value for name, value in match.groupdict().items()}
            if "kind" in values:
                values["kind"] = values["kind"] or "model"
            return function(request, **values)
    raise ApiError(404, f"no such route: {request.method} {request.path}")


def _read(request: Request, kind: str, name: str, *, content: bool = False) -> Repo:
    return request.server.store.readable(kind, name, request.account, content=content)


def _write(request: Request, kind: str, name: str) -> Repo:
    return request.server.store.writable(kind, name, request.account)


# Accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> Answer:
    account = request.account
    if account is None:
        raise ApiError(401, "Invalid username or password.")
    return Answer(body={"type": "user", "name": account.name, "orgs": [{"name": name} for name in account.orgs]})


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Answer:
    content = request.json["content"]
    match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return Answer(400, {"errors": [{"message": str(error)}], "warnings": []})
    warnings = [] if isinstance(data, dict) else [{"message": "empty or missing yaml metadata in repo card"}]
    return Answer(body={"errors": [], "warnings": warnings})


@route("POST", "/api/repos/create")
def create_repo(request: Request) -> Answer:
    store, account, data = request.server.store, request.account, request.json
    if account is None:
        raise ApiError(401, "Invalid username or password.")
    namespace, kind = data.get("organization") or account.name, data.get("type") or "model"
    name = f"{namespace}/{data['name']}"
    if not account.may_write(namespace):
        raise ApiError(403, "You don't have the rights to create a repository under this namespace")
    url = f"{request.server.url}/{'' if kind == 'model' else kind + 's/'}{name}"
    if (kind, name) in store.repos:
        return Answer(409, {"error": "You already created this repo", "url": url})
    store.create(kind, name, data.get("visibility") == "private")
    return Answer(body={"url": url, "name": name})


@route("DELETE", "/api/repos/delete")
def delete_repo(request: Request) -> Answer:
    data = request.json
    name = f"{data.get('organization') or getattr(request.account, 'name', '')}/{data['name']}"
    repo = _write(request, data.get("type") or "model", name)
    del request.server.store.repos[(repo.kind, repo.name)]
    return Answer()


@route("PUT", _REPO + "/settings")
def settings(request: Request, kind: str, name: str) -> Answer:
    repo, data = _write(request, kind, name), request.json
    repo.gated = data.get("gated", repo.gated)
    if "visibility" in data:
        repo.private = data["visibility"] == "private"
    return Answer(body={})


@route("GET", _REPO + r"(?:/revision/(?P<revision>[^/]+))?")
def info(request: Request, kind: str, name: str, revision: str | None) -> Answer:
    repo = _read(request, kind, name)
    commit = repo.commit_at(revision or "main")
    siblings = [{"rfilename": path} for path in sorted(commit.tree)]
    if "blobs" in request.query:
        for sibling in siblings:
            entry = commit.tree[sibling["rfilename"]].describe(sibling["rfilename"])
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
    facts = {"id": repo.name, "_id": repo.name, "author": repo.namespace, "sha": commit.sha, "siblings": siblings}
    facts |= {"private": repo.private, "gated": repo.gated, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
    return Answer(body={**facts, "createdAt": DATE, "lastModified": DATE})


# Upload


@route("POST", _REPO + "/preupload/(?P<revision>[^/]+)")
def preupload(request: Request, kind: str, name: str, revision: str) -> Answer:
    tree = _write(request, kind, name).commit_at(revision).tree
    files = []
    for file in request.json["files"]:
        large = file["path"].endswith(LARGE) or file["size"] > 10 * 2**20
        old = tree.get(file["path"])
        mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        files.append({"path": file["path"], **mode, **({"oid": old.oid} if old else {})})
    return Answer(body={"files": files})


@route("POST", _FILES + r"\.git/info/lfs/objects/batch")
def lfs_batch(request: Request, kind: str, name: str) -> Answer:
    _write(request, kind, name)
    server, objects = request.server, []
    for item in request.json["objects"]:
        oid, size = item["oid"], item["size"]
        if not re.fullmatch("[0-9a-f]{64}", oid):
            raise ApiError(422, "no SHA-256")
        if server.store.path(oid).is_file():
            objects.append({"oid": oid, "size": size})
            continue
        href, header = f"{server.cdn_url}/lfs/{oid}", {}
        if size > server.multipart_bytes:
            chunk = server.multipart_bytes // 2
            parts = range(1, -(-size // chunk) + 1)
            header = {"chunk_size": str(chunk), **{f"{part:05d}": f"{href}/{part}" for part in parts}}
            href = f"{server.url}/lfs/{oid}/complete"
        verify = {"href": f"{server.url}/lfs/{oid}/verify"}
        objects.append(
            {"oid": oid, "size": size, "actions": {"upload": {"href": href, "header": header}, "verify": verify}}
        )
    return Answer(body={"transfer": "multipart", "objects": objects})


@route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?")
def lfs_put(request: Request, oid: str, part: str | None) -> Answer:
    store = request.server.store
    if part is not None:
        store.put(f"{oid}.part{part}", request.body)
        return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise ApiError(400, "content and hash differ")
    store.put(oid, request.body)
    return Answer()


@route("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete")
def lfs_complete(request: Request, oid: str) -> Answer:
    store = request.server.store
    paths = [store.path(f"{oid}.part{part['partNumber']}") for part in request.json["parts"]]
    content = b"".join(path.read_bytes() for path in paths)
    if hashlib.sha256(content).hexdigest() != oid:
        raise ApiError(400, "content and hash differ")
    store.put(oid, content)
    for path in paths:
        path.unlink()
    return Answer(body={})


@route("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify")
def lfs_verify(request: Request, oid: str) -> Answer:
    path = request.server.store.path(oid)
    if not path.is_file() or path.stat().st_size != request.json["size"]:
        raise ApiError(404, "no such object")
    return Answer(body={})


@route("POST", _REPO + "/commit/(?P<revision>[^/]+)")
def commit_files(request: Request, kind: str, name: str, revision: str) -> Answer:
    repo, store = _write(request, kind, name), request.server.store
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = lines[0]["value"]
    if revision not in repo.branches:
        raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    head = repo.commit_at(revision)
    if header.get("parentCommit") not in (None, head.sha):
        raise ApiError(412, "A commit has happened since. Please refresh and try again.")
    tree = dict(head.tree)
    for line in lines[1:]:
        value, path = line["value"], line["value"]["path"]
        if line["key"] == "file":
            tree[path] = store.put_small(base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            if not store.path(value["oid"]).is_file():
                raise ApiError(400, f"no object {value['oid']} for {path}")
            tree[path] = Entry(value["oid"], store.path(value["oid"]).stat().st_size, True)
        elif line["key"] == "deletedFile":
            if tree.pop(path, None) is None:
                raise ApiError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif line["key"] == "deletedFolder":
            tree = {key: entry for key, entry in tree.items() if not key.startswith(path.rstrip("/") + "/")}
        else:
            raise ApiError(400, f"unknown operation {line['key']}")
    commit = repo.add_commit(revision, header["summary"], tree)
    url = f"{request.server.url}/{'' if kind == 'model' else kind + 's/'}{name}/commit/{commit.sha}"
    return Answer(body={"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})


# Versions


@route("GET", _REPO + "/refs")
def refs(request: Request, kind: str, name: str) -> Answer:
    repo = _read(request, kind, name)
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
    return Answer(body={"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


@route("POST DELETE", _REPO + "/(?P<sort>tag|branch)/(?P<reference>[^/]+)")
def change_reference(request: Request, kind: str, name: str, sort: str, reference: str) -> Answer:
    repo = _write(request, kind, name)
    known = repo.tags if sort == "tag" else repo.branches
    if request.method == "DELETE":
        if known.pop(reference, None) is None:
            raise ApiError(404, f"no {sort} {reference}", "RevisionNotFound")
        return Answer()
    # A tag's route names the revision and its body the tag; a branch's route names the branch.
    new = request.json["tag"] if sort == "tag" else reference
    start = reference if sort == "tag" else request.json.get("startingPoint", "main")
    sha = repo.commit_at(start).sha
    if new in known:
        raise ApiError(409, f"Tag reference exists already: {new}")
    known[new] = sha
    return Answer()


@route("GET", _REPO + "/commits/(?P<revision>[^/]+)")
def commits(request: Request, kind: str, name: str, revision: str) -> Answer:
    repo = _read(request, kind, name)
    found: list[Commit] = []
    sha: str | None = repo.commit_at(revision).sha
    while sha is not None:
        found.append(repo.commits[sha])
        sha = found[-1].parent
    return Answer(body=[{"id": c.sha, "title": c.title, "message": "", "authors": [], "date": DATE} for c in found])


# Download


@route("GET", _REPO + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?")
def tree(request: Request, kind: str, name: str, revision: str, folder: str | None) -> Answer:
    files = _read(request, kind, name).commit_at(revision).tree
    prefix = f"{folder}/" if folder else ""
    recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    entries: dict[str, dict[str, Any]] = {}
    for path, entry in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            parent = prefix + "/".join(parts[:depth])
            if recursive or depth == 1:
                oid = hashlib.sha1(parent.encode()).hexdigest()
                entries[parent] = {"type": "directory", "path": parent, "oid": oid, "size": 0}
        if recursive or len(parts) == 1:
            entries[path] = entry.describe(path)
    if folder and not entries:
        raise ApiError(404, f"{folder} does not exist", "EntryNotFound")
    listed, start = list(entries.values()), int(request.query.get("cursor", ["0"])[0])
    end = start + request.server.page_size
    headers = {}
    if end < len(listed):
        query = f"recursive={recursive}&cursor={end}"
        headers["Link"] = f'<{request.server.url}{request.path}?{query}>; rel="next"'
    return Answer(body=listed[start:end], headers=headers)


@route("POST", _REPO + "/paths-info/(?P<revision>[^/]+)")
def paths_info(request: Request, kind: str, name: str, revision: str) -> Answer:
    files = _read(request, kind, name).commit_at(revision).tree
    found = []
    for path in parse_qs(request.body.decode()).get("paths", []):
        if path in files:
            found.append(files[path].describe(path))
        elif any(other.startswith(f"{path}/") for other in files):
            found.append({"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()})
    return Answer(body=found)


@route("GET HEAD", _FILES + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Request, kind: str, name: str, revision: str, path: str) -> Answer:
    commit = _read(request, kind, name, content=True).commit_at(revision)
    headers = {"X-Repo-Commit": commit.sha}
    entry = commit.tree.get(path)
    if entry is None:
        error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return Answer(404, {"error": "Entry not found"}, {**headers, **error})
    if entry.large:
        headers |= {"X-Linked-Etag": f'"{entry.oid}"', "X-Linked-Size": str(entry.size)}
        return Answer(302, b"", {**headers, "Location": f"{request.server.cdn_url}/cdn/{entry.oid}"})
    return _content(request, entry.oid, headers)


@route("GET HEAD", "/cdn/(?P<oid>[0-9a-f]{64})")
def cdn(request: Request, oid: str) -> Answer:
    if request.token is not None:
        raise ApiError(400, "a token was sent to another host")
    return _content(request, oid, {})


def _content(request: Request, oid: str, headers: dict[str, str]) -> Answer:
    content = request.server.store.path(oid).read_bytes()
    headers = {**headers, "ETag": f'"{oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or request.headers.get("range") or "")
    if asked is None:
        return Answer(200, content, {**headers, "Content-Length": str(len(content))})
    start, end = int(asked[1]), int(asked[2] or len(content) - 1)
    if start >= len(content):
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    part = content[start : end + 1]
    headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
    return Answer(206, part, headers)
