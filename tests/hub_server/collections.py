"""Collections: routes of their own, beside those of repositories."""

from __future__ import annotations

import re

from .api import DATE, Answer, Request, route
from .store import ApiError


@route("POST", "/api/collections")
def create_collection(request: Request) -> Answer:
    data = request.json
    if request.account is None or not request.account.may_write(data["namespace"]):
        raise ApiError(403, "You don't have the rights to create a collection under this namespace")
    slug = f"{data['namespace']}/{re.sub('[^a-z0-9]+', '-', data['title'].lower())}-0123456789abcdef01234567"
    known = request.server.store.collections
    if slug in known:
        return Answer(409, {"error": "exists", "slug": slug})
    known[slug] = {
        "slug": slug,
        "title": data["title"],
        "description": data.get("description"),
        "owner": {"name": data["namespace"]},
        "items": [],
        "lastUpdated": DATE,
        "position": 0,
        "private": data["private"],
        "theme": "blue",
        "upvotes": 0,
    }
    return Answer(body=known[slug])


@route("GET", "/api/collections/(?P<slug>.+)")
def get_collection(request: Request, slug: str) -> Answer:
    if slug not in request.server.store.collections:
        raise ApiError(404, "Collection not found")
    return Answer(body=request.server.store.collections[slug])


@route("POST", "/api/collections/(?P<slug>.+)/items?")
def add_to_collection(request: Request, slug: str) -> Answer:
    collection, item = request.server.store.collections[slug], request.json["item"]
    if any(known["id"] == item["id"] and known["type"] == item["type"] for known in collection["items"]):
        raise ApiError(409, "already in the collection")
    number = len(collection["items"])
    note = {"text": request.json.get("note")} if request.json.get("note") else None
    collection["items"].append({"_id": f"{number:024x}", **item, "position": number, "note": note})
    return Answer(body=collection)
