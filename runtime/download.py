"""Fetch public datasets from their home repositories, each file checked before it is kept.

A recipe pins a repository and a commit. The commit's tree listing names every file with its git
blob SHA-1; a download is kept only if its bytes have that hash (and, where the recipe pins one,
that SHA-256). A file grows as ``<name>.part`` beside its place and is renamed when it is whole and
right, so a file without ``.part`` is always complete. A transfer that breaks is resumed with a
Range request at once as long as each try brings bytes; later calls resume too.

References
----------
Pro Git, 2nd edition, chapter 10.2 (blob hash); RFC 9110, section 14 (range requests).
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import quote

import httpx

from planner.domain.check import closed_mapping, items, one_of, text
from planner.domain.errors import DownloadFailed, InvalidInput
from planner.domain.files import data_dir, read_yaml

__all__ = [
    "BASE_URL_VARIABLE",
    "RECIPES_SCHEMA",
    "Bases",
    "Fetched",
    "Recipe",
    "Source",
    "fetch",
    "find_recipe",
    "load_recipes",
]

RECIPES_SCHEMA = "almanac.datasets/1"
BASE_URL_VARIABLE = "ALMANAC_DATA_URL"
_LFS_HEADER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Files of a repository.

    Parameters
    ----------
    path
        Path in the repository; ``*`` and ``?`` match within one folder level.
    output
        Path to write to, relative to the dataset's folder; None keeps the path of the repository.
        Only a path without wildcards can be renamed.
    sha256
        Pinned hash of a path without wildcards, or None.
    """

    path: str
    output: str | None = None
    sha256: str | None = None

    def matches(self, path: str) -> bool:
        """Return whether a path of the repository is meant."""
        wanted, found = self.path.split("/"), path.split("/")
        return len(wanted) == len(found) and all(map(fnmatchcase, found, wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Where a dataset comes from.

    Parameters
    ----------
    form
        ``ready``: `almanac train` and `almanac simulate` read the files as they are; ``raw``: the
        files are as published and need conversion first.
    """

    name: str
    title: str
    repo: str
    commit: str
    sources: tuple[Source, ...]
    licence: str
    credit: str
    form: Literal["ready", "raw"]
    note: str = ""

    @property
    def home(self) -> str:
        """Address of the pinned commit, for people."""
        return f"https://github.com/{self.repo}/tree/{self.commit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bases:
    """Servers to ask: ``api`` for tree listings, ``raw`` for files."""

    api: str = "https://api.github.com"
    raw: str = "https://raw.githubusercontent.com"

    @classmethod
    def at(cls, base_url: str | None, environment: Mapping[str, str] = os.environ) -> Bases:
        """Return one mirror for both, from an address or else from `BASE_URL_VARIABLE`.

        Raises
        ------
        InvalidInput
            If the address is not one of http or https.
        """
        address = base_url or environment.get(BASE_URL_VARIABLE)
        if not address:
            return cls()
        if not address.startswith(("http://", "https://")):
            raise InvalidInput(
                f"{address!r} is not an address",
                where="--base-url" if base_url else BASE_URL_VARIABLE,
                remedy="use http://host:port or https://host",
            )
        return cls(api=address.rstrip("/"), raw=address.rstrip("/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """One file: its place and size in bytes; ``fresh`` is False if it was there already."""

    path: Path
    size: int
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blob:
    path: str
    sha1: str
    size: int


Progress = Callable[[str, int, int], object]
"""Called with a file's name, the bytes it has and the bytes it will have."""


def load_recipes(path: Path | None = None) -> Mapping[str, Recipe]:
    """Return the recipes by name, from ``data/datasets.yaml`` unless another file is given.

    Raises
    ------
    InvalidInput
        Naming file, field, value and remedy.
    """
    file = path or data_dir() / "datasets.yaml"
    document = read_yaml(file, what="dataset recipes")
    try:
        raw = closed_mapping(document, "", {"schema", "datasets"})
        one_of(raw.get("schema"), "schema", (RECIPES_SCHEMA,))
        recipes = [
            _recipe(value, f"datasets[{position}]")
            for position, value in enumerate(items(raw.get("datasets"), "datasets"))
        ]
    except InvalidInput as error:
        where = f"{file}: {error.where}" if error.where else str(file)
        raise InvalidInput(error.what, where=where, remedy=error.remedy) from error
    return {recipe.name: recipe for recipe in recipes}


def _recipe(value: Any, where: str) -> Recipe:
    known = {"name", "title", "repo", "commit", "files", "licence", "credit", "form", "note"}
    raw = closed_mapping(value, where, known)
    sources = []
    for position, item in enumerate(items(raw.get("files"), f"{where}.files")):
        place = f"{where}.files[{position}]"
        one = closed_mapping(item, place, {"path", "output", "sha256"})
        given = {key: text(one[key], f"{place}.{key}") for key in one}
        source = Source(
            path=text(one.get("path"), f"{place}.path"),
            output=given.get("output"),
            sha256=given.get("sha256"),
        )
        if "*" in source.path and (source.output or source.sha256):
            raise InvalidInput(
                f"{source.path!r} stands for several files",
                where=place,
                remedy="give output and sha256 for single files only",
            )
        sources.append(source)
    return Recipe(
        sources=tuple(sources),
        form=cast("Literal['ready', 'raw']", one_of(raw.get("form"), f"{where}.form", _FORMS)),
        note=str(raw.get("note", "")),
        **{
            name: text(raw.get(name), f"{where}.{name}")
            for name in ("name", "title", "repo", "commit", "licence", "credit")
        },
    )


_FORMS = ("ready", "raw")


def find_recipe(name: str, recipes: Mapping[str, Recipe]) -> Recipe:
    """Return a recipe by name.

    Raises
    ------
    InvalidInput
        If there is none; names that look alike are suggested.
    """
    if name in recipes:
        return recipes[name]
    close = difflib.get_close_matches(name, recipes, n=3)
    raise InvalidInput(
        f"no dataset {name!r}",
        where="data get",
        remedy=f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(recipes)}",
    )


def fetch(
    recipe: Recipe,
    folder: Path,
    *,
    bases: Bases | None = None,
    progress: Progress = lambda _name, _done, _total: None,
    client: httpx.Client | None = None,
) -> list[Fetched]:
    """Download a dataset into its place below ``folder`` and return its files.

    Files that are there already with the right hash are left alone.

    Parameters
    ----------
    folder
        ``ready`` datasets go to ``<folder>/<name>``, where `almanac train` looks for them; ``raw``
        ones to ``<folder>/raw/<name>``, where it does not.
    progress
        Called now and then for each file.
    client
        HTTP client to use; one of its own by default.

    Raises
    ------
    DownloadFailed
        If a server cannot be reached or refuses, or a file does not have its hash; the message
        says how to place the files by hand. Nothing wrong is kept.
    InvalidInput
        If the folder cannot be written to.
    """
    if client is None:
        with httpx.Client(timeout=30.0, follow_redirects=True) as own:
            return fetch(recipe, folder, bases=bases, progress=progress, client=own)
    target = folder / recipe.name if recipe.form == "ready" else folder / "raw" / recipe.name
    job = _Job(recipe, target, bases or Bases(), client, progress)
    return [job.bring(source, blob) for source, blob in job.wanted()]


@dataclass(frozen=True, slots=True)
class _Job:
    recipe: Recipe
    target: Path
    bases: Bases
    client: httpx.Client
    progress: Progress

    def wanted(self) -> list[tuple[Source, _Blob]]:
        """Return the files of the recipe with what the pinned commit says of them."""
        tree = self.tree()
        pairs = []
        for source in self.recipe.sources:
            found = [(source, blob) for blob in tree if source.matches(blob.path)]
            if not found:
                raise DownloadFailed(
                    f"{self.recipe.name}: nothing matches {source.path} in {self.recipe.home}; "
                    "the recipe in data/datasets.yaml is wrong"
                )
            pairs += found
        return pairs

    def tree(self) -> list[_Blob]:
        """Return all files of the pinned commit."""
        recipe = self.recipe
        address = f"{self.bases.api}/repos/{recipe.repo}/git/trees/{recipe.commit}?recursive=1"
        try:
            answer = self.client.get(address)
        except httpx.TransportError as error:
            raise self.unreachable(address, error) from error
        self.require_success(answer)
        try:
            raw = answer.json()
            whole = not raw.get("truncated")
            blobs = [
                _Blob(path=str(one["path"]), sha1=str(one["sha"]), size=int(one["size"]))
                for one in raw["tree"]
                # A path that climbs out of the folder is no file of any git tree.
                if one["type"] == "blob" and ".." not in one["path"].split("/")
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DownloadFailed(
                f"{address}: the answer is not a tree listing ({error!r}); "
                "check --base-url, or a proxy on the way"
            ) from error
        if not whole:
            raise DownloadFailed(
                f"{address}: the listing is cut short, so files cannot be checked; "
                f"clone {recipe.home} and copy the files to {self.target}"
            )
        return blobs

    def bring(self, source: Source, blob: _Blob) -> Fetched:
        """Return a file, downloaded unless it is there with the right hash."""
        path = self.target / (source.output or blob.path)
        part = path.with_name(f"{path.name}.part")
        address = f"{self.bases.raw}/{self.recipe.repo}/{self.recipe.commit}/{quote(blob.path)}"
        try:
            if path.is_file() and _is_right(path, blob, source):
                return Fetched(path=path, size=blob.size, fresh=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.grow(part, blob, address)
            _check(part, blob, source, address)
            part.replace(path)
        except OSError as error:
            raise InvalidInput(
                f"cannot write there: {error.strerror}",
                where=str(path),
                remedy="choose another folder with --out",
            ) from error
        return Fetched(path=path, size=blob.size, fresh=True)

    def grow(self, part: Path, blob: _Blob, address: str) -> None:
        """Bring ``part`` to its full size, going on from what it holds."""
        if _size(part) > blob.size:
            part.unlink()
        while _size(part) < blob.size or not part.exists():
            before = _size(part)
            cause: httpx.TransportError | None = None
            try:
                self.transfer(part, before, blob, address)
            except httpx.TransportError as error:
                cause = error
            if before < _size(part) or _size(part) == blob.size:
                continue
            if cause is not None:
                raise self.unreachable(address, cause) from cause
            raise DownloadFailed(
                f"{address}: the server sent {_size(part)} of {blob.size} bytes; try again later, "
                "it goes on from there"
            )

    def transfer(self, part: Path, before: int, blob: _Blob, address: str) -> None:
        """Append what one request brings, or start over where the server cannot go on."""
        # Compressed transfer would make Range count other bytes than the file has.
        headers = {"Accept-Encoding": "identity"}
        if before:
            headers["Range"] = f"bytes={before}-"
        with self.client.stream("GET", address, headers=headers) as answer:
            if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            self.require_success(answer)
            resumed = answer.status_code == httpx.codes.PARTIAL_CONTENT and answer.headers.get(
                "Content-Range", ""
            ).startswith(f"bytes {before}-")
            done = before if resumed else 0
            with part.open("ab" if resumed else "wb") as out:
                # As they come: a chunk size would hold bytes back, and a lost connection take them.
                for chunk in answer.iter_bytes():
                    out.write(chunk)
                    done += len(chunk)
                    self.progress(blob.path, done, blob.size)
                    if done > blob.size:
                        break

    def unreachable(self, address: str, error: httpx.TransportError) -> DownloadFailed:
        """Return the error for a server that cannot be talked to."""
        host = httpx.URL(address).host
        return DownloadFailed(
            f"cannot reach {host} ({str(error) or type(error).__name__}); check the network or "
            "proxy and run the command again, it goes on where it stopped; " + self.by_hand()
        )

    def require_success(self, answer: httpx.Response) -> None:
        """Raise unless the server gave what was asked for."""
        if answer.is_success:
            return
        busy = answer.status_code in (httpx.codes.FORBIDDEN, httpx.codes.TOO_MANY_REQUESTS)
        raise DownloadFailed(
            f"{answer.request.url} answered {answer.status_code} {answer.reason_phrase}; "
            f"{'it limits requests per hour: ' if busy else ''}try again later; {self.by_hand()}"
        )

    def by_hand(self) -> str:
        """Return how to do without this command."""
        names = ", ".join(
            f"{source.path} as {source.output}" if source.output else source.path
            for source in self.recipe.sources
        )
        return f"or get the files from {self.recipe.home} and put them into {self.target}: {names}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(part: Path, blob: _Blob, source: Source, address: str) -> None:
    if not _is_right(part, blob, source):
        part.unlink()
        raise DownloadFailed(
            f"{address}: the bytes received do not have the hash of the pinned commit "
            f"({source.sha256 or blob.sha1}); nothing was kept. Try again; if it stays so, a proxy "
            "or mirror on the way changes files"
        )
    with part.open("rb") as head:
        pointer = head.read(len(_LFS_HEADER)) == _LFS_HEADER
    if pointer:
        part.unlink()
        raise DownloadFailed(
            f"{address}: the repository holds only a pointer, the file itself is in Git LFS; "
            "clone the repository with git-lfs and copy the file"
        )


def _is_right(path: Path, blob: _Blob, source: Source) -> bool:
    if _size(path) != blob.size:
        return False
    # SHA-1 is what git names blobs by; it guards against accidents, SHA-256 where pinned.
    sha1 = hashlib.sha1(b"blob %d\0" % blob.size, usedforsecurity=False)
    sha256 = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            sha1.update(chunk)
            sha256.update(chunk)
    return sha1.hexdigest() == blob.sha1 and source.sha256 in (None, sha256.hexdigest())
