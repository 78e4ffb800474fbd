"""Downloads, against a loopback server that plays the two GitHub hosts."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest

from models.importers.folder import read_folder
from planner.domain.errors import DownloadFailed, InvalidInput
from runtime.download import Bases, Recipe, Source, fetch, find_recipe, load_recipes

REPO, COMMIT = "someone/things", "c" * 40
FILES = {
    "data/one file.csv": b"a,b\n" + b"1,2\n" * 5000,
    "data/two.csv": b"x\n",
    "data/deep/three.csv": b"",
    "other/four.json": b"{}",
}


def blob_hash(content: bytes) -> str:
    """Return the git blob SHA-1."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Mirror:
    """What the server does; every request is noted as (path, Range)."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    listed: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)
    """For each further file request in turn: bytes sent before the connection drops."""
    status: int = 200
    truncated: bool = False
    listing: bytes | None = None
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def tree(self) -> bytes:
        """Return the tree listing."""
        if self.listing is not None:
            return self.listing
        rows: list[dict[str, object]] = [{"path": "data", "type": "tree", "sha": "0" * 40}]
        for path, content in self.listed.items():
            sha = blob_hash(content)
            rows.append({"path": path, "type": "blob", "sha": sha, "size": len(content)})
        return json.dumps({"tree": rows, "truncated": self.truncated}).encode()


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    """Yield a running mirror."""
    state = Mirror()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Be quiet."""

        def do_GET(self) -> None:
            """Answer a listing or a file."""
            wanted = self.headers.get("Range")
            path = unquote(self.path)
            state.requests.append((path, wanted))
            self.close_connection = True
            if state.status != 200:
                self.answer(state.status, b"")
            elif path == f"/repos/{REPO}/git/trees/{COMMIT}?recursive=1":
                self.answer(200, state.tree())
            else:
                self.file(state.files[path.removeprefix(f"/{REPO}/{COMMIT}/")], wanted)

        def file(self, content: bytes, wanted: str | None) -> None:
            """Answer a file, from where it was asked for."""
            begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if begin and state.ranges:
                if begin >= len(content):
                    self.answer(416, b"")
                    return
                span = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                self.answer(206, content[begin:], span)
            else:
                self.answer(200, content)

        def answer(self, status: int, body: bytes, span: str | None = None) -> None:
            """Send a response, cut short if so planned."""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            if span:
                self.send_header("Content-Range", span)
            self.end_headers()
            is_file = status in (200, 206) and not self.path.startswith("/repos/")
            self.wfile.write(
                body[: state.cut_after.pop(0)] if is_file and state.cut_after else body
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def recipe(*sources: Source, form: str = "ready") -> Recipe:
    """Return a recipe of the mirror's repository."""
    return Recipe(
        name="things",
        title="Things",
        repo=REPO,
        commit=COMMIT,
        sources=sources or (Source(path="data/one file.csv", output="one.csv"),),
        licence="MIT",
        credit="someone",
        form=form,  # type: ignore[arg-type]
    )


def test_files_arrive_where_the_importer_looks(mirror: Mirror, tmp_path: Path) -> None:
    """Wildcards stay within a level, names can be changed, a second call downloads nothing."""
    wanted = recipe(
        Source(path="data/one file.csv", output="one.csv"),
        Source(path="data/t*.csv"),
        Source(path="data/*/*.csv"),
    )
    seen: list[tuple[str, int, int]] = []
    bases = Bases.at(mirror.url)
    files = fetch(wanted, tmp_path, bases=bases, progress=lambda *one: seen.append(one))
    found = {one.path.relative_to(tmp_path / "things").as_posix(): one.size for one in files}
    assert found == {"one.csv": 20004, "data/two.csv": 2, "data/deep/three.csv": 0}
    assert (tmp_path / "things/one.csv").read_bytes() == FILES["data/one file.csv"]
    assert seen[-1] == ("data/two.csv", 2, 2)
    mirror.requests.clear()
    again = fetch(wanted, tmp_path, bases=bases)
    assert [one.fresh for one in again] == [False] * 3
    assert len(mirror.requests) == 1
    assert not list(tmp_path.rglob("*.part"))


def test_raw_datasets_stay_out_of_the_importers_way(mirror: Mirror, tmp_path: Path) -> None:
    """A dataset that needs conversion goes to raw/NAME."""
    files = fetch(recipe(form="raw"), tmp_path, bases=Bases.at(mirror.url))
    assert files[0].path == tmp_path / "raw/things/one.csv"


def test_resumes_where_an_earlier_call_stopped(mirror: Mirror, tmp_path: Path) -> None:
    """What lies in the .part file is not asked for again."""
    part = tmp_path / "things/one.csv.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(FILES["data/one file.csv"][:7000])
    fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))
    assert mirror.requests[-1][1] == "bytes=7000-"
    assert (tmp_path / "things/one.csv").read_bytes() == FILES["data/one file.csv"]


def test_resumes_at_once_while_bytes_come(mirror: Mirror, tmp_path: Path) -> None:
    """Connections that drop are taken up again, as long as each brings something."""
    mirror.cut_after = [5000, 3000]
    fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))
    assert [wanted for _, wanted in mirror.requests[1:]] == [None, "bytes=5000-", "bytes=8000-"]


def test_gives_up_when_no_byte_comes_and_keeps_what_it_has(mirror: Mirror, tmp_path: Path) -> None:
    """A server that stalls is an error with the host; the next call goes on."""
    mirror.cut_after = [5000, 0]
    with pytest.raises(DownloadFailed, match=r"127\.0\.0\.1.*goes on where it stopped"):
        fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))
    assert (tmp_path / "things/one.csv.part").stat().st_size == 5000
    assert not (tmp_path / "things/one.csv").exists()
    fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))
    assert mirror.requests[-1][1] == "bytes=5000-"


def test_starts_over_when_the_server_knows_no_ranges(mirror: Mirror, tmp_path: Path) -> None:
    """A full answer to a range request replaces the part instead of doubling it."""
    mirror.ranges = False
    mirror.cut_after = [5000]
    fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))
    assert (tmp_path / "things/one.csv").read_bytes() == FILES["data/one file.csv"]


@pytest.mark.parametrize("content", [b"b" * 20004, b"b" * 30000])
def test_wrong_bytes_are_not_kept(mirror: Mirror, tmp_path: Path, content: bytes) -> None:
    """A file without the hash of the pinned commit leaves nothing behind."""
    mirror.files["data/one file.csv"] = content
    with pytest.raises(DownloadFailed, match="nothing was kept"):
        fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_short_file_is_an_error(mirror: Mirror, tmp_path: Path) -> None:
    """A server whose file ends before the listing says so is refused."""
    mirror.files["data/one file.csv"] = b"short"
    with pytest.raises(DownloadFailed, match="416"):
        fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))
    mirror.ranges = False
    with pytest.raises(DownloadFailed, match="5 of 20004 bytes"):
        fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))


def test_a_damaged_file_is_fetched_again(mirror: Mirror, tmp_path: Path) -> None:
    """A file that is there but altered does not pass for the dataset."""
    (tmp_path / "things").mkdir()
    (tmp_path / "things/one.csv").write_bytes(b"b" * 20004)
    assert fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))[0].fresh


def test_pinned_sha256_counts_too(mirror: Mirror, tmp_path: Path) -> None:
    """A recipe's own hash is checked besides the one of the listing."""
    right = hashlib.sha256(FILES["data/two.csv"]).hexdigest()
    fetch(recipe(Source(path="data/two.csv", sha256=right)), tmp_path, bases=Bases.at(mirror.url))
    wrong = recipe(Source(path="data/two.csv", output="2.csv", sha256="0" * 64))
    with pytest.raises(DownloadFailed, match="0" * 64):
        fetch(wrong, tmp_path, bases=Bases.at(mirror.url))


def test_pointers_to_large_files_are_refused(mirror: Mirror, tmp_path: Path) -> None:
    """A Git LFS pointer has the right hash but is not the data."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    mirror.files["data/two.csv"] = mirror.listed["data/two.csv"] = pointer
    with pytest.raises(DownloadFailed, match="git-lfs"):
        fetch(recipe(Source(path="data/two.csv")), tmp_path, bases=Bases.at(mirror.url))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_network_says_which_host_and_what_to_do(tmp_path: Path) -> None:
    """Without a network the message names host, home, folder and file names."""

    def refuse(request: httpx.Request) -> httpx.Response:
        message = "Name or service not known"
        raise httpx.ConnectError(message, request=request)

    with (
        httpx.Client(transport=httpx.MockTransport(refuse)) as client,
        pytest.raises(DownloadFailed) as caught,
    ):
        fetch(recipe(), tmp_path, client=client)
    for words in (
        "cannot reach api.github.com (Name or service not known)",
        f"https://github.com/{REPO}/tree/{COMMIT}",
        str(tmp_path / "things"),
        "data/one file.csv as one.csv",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(("status", "words"), [(403, "limits requests"), (500, "answered 500")])
def test_refusals_are_told(mirror: Mirror, tmp_path: Path, status: int, words: str) -> None:
    """A status that is no success is in the message, with what to do."""
    mirror.status = status
    with pytest.raises(DownloadFailed, match=words):
        fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))


@pytest.mark.parametrize("listing", [b"<html>", b"[]", b'{"tree": [{"type": "blob"}]}'])
def test_a_listing_that_is_none(mirror: Mirror, tmp_path: Path, listing: bytes) -> None:
    """An answer of another kind (a proxy's page) is one clear error."""
    mirror.listing = listing
    with pytest.raises(DownloadFailed, match="not a tree listing"):
        fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))


def test_listings_that_do_not_fit(mirror: Mirror, tmp_path: Path) -> None:
    """A shortened listing, a path that is not in it and one that climbs out are refused."""
    with pytest.raises(DownloadFailed, match=r"nothing matches data/five\.csv"):
        fetch(recipe(Source(path="data/five.csv")), tmp_path, bases=Bases.at(mirror.url))
    mirror.listed["data/../../evil.csv"] = b"evil"
    with pytest.raises(DownloadFailed, match="nothing matches"):
        fetch(recipe(Source(path="data/*/*/evil.csv")), tmp_path, bases=Bases.at(mirror.url))
    mirror.truncated = True
    with pytest.raises(DownloadFailed, match="cut short"):
        fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))


def test_a_folder_that_is_a_file(mirror: Mirror, tmp_path: Path) -> None:
    """A place that cannot be written to is the user's to mend."""
    (tmp_path / "things").write_text("in the way")
    with pytest.raises(InvalidInput, match="--out"):
        fetch(recipe(), tmp_path, bases=Bases.at(mirror.url))


def test_bases_come_from_argument_then_environment() -> None:
    """The argument wins over the variable; an address must be one."""
    assert Bases.at(None, {}) == Bases()
    assert Bases.at(None, {"ALMANAC_DATA_URL": "http://b/"}).raw == "http://b"
    assert Bases.at("http://a", {"ALMANAC_DATA_URL": "http://b"}).api == "http://a"
    with pytest.raises(InvalidInput, match="--base-url: 'a'"):
        Bases.at("a", {})


def test_bundled_recipes_are_sound() -> None:
    """Every recipe pins a full commit, states licence and credit, and stays in its folder."""
    recipes = load_recipes()
    assert {"azure_llm_2023", "mooncake_fast25"} <= {
        name for name, one in recipes.items() if one.form == "ready"
    }
    for one in recipes.values():
        assert len(one.commit) == 40
        assert set(one.commit) <= set("0123456789abcdef")
        assert one.repo.count("/") == 1
        for source in one.sources:
            assert not source.path.startswith("/")
            assert ".." not in f"{source.path}/{source.output}".split("/")


CONTENT = {
    ".csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    + "".join(f"2023-11-16 18:17:0{k}.9799600,{100 + k},{10 + k}\n" for k in range(9)),
    ".jsonl": "".join(
        f'{{"timestamp": {1000 * k}, "input_length": {100 + k}, "output_length": 9, '
        '"hash_ids": [0]}\n'
        for k in range(9)
    ),
}


@pytest.mark.parametrize(
    "name", [name for name, one in load_recipes().items() if one.form == "ready"]
)
def test_ready_datasets_are_read_as_they_lie(tmp_path: Path, name: str) -> None:
    """`almanac train --traces` finds what `almanac data get` put there."""
    for source in load_recipes()[name].sources:
        path = tmp_path / name / (source.output or source.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CONTENT[path.suffix])
    found = read_folder(tmp_path, seed=0)
    assert not found.ignored
    assert [one.rows_read for one in found.public] == [9] * len(load_recipes()[name].sources)


def test_unknown_names_get_a_suggestion() -> None:
    """A slip of the pen is answered with the nearest name, anything else with all names."""
    recipes = load_recipes()
    with pytest.raises(InvalidInput, match="did you mean mooncake_fast25"):
        find_recipe("mooncake_fast2", recipes)
    with pytest.raises(InvalidInput, match=r"known: azure_llm_2023, "):
        find_recipe("zzz", recipes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema: almanac.datasets/2\ndatasets: []", "schema"),
        ("schema: almanac.datasets/1\ndatasets: [{name: x}]", r"datasets\[0\]\.files"),
        (
            "schema: almanac.datasets/1\ndatasets: [{name: x, files: [{path: 'a*', output: b}]}]",
            "several files",
        ),
    ],
)
def test_broken_recipes_name_the_field(tmp_path: Path, text: str, message: str) -> None:
    """A recipe file with a mistake is refused with its path and field."""
    file = tmp_path / "datasets.yaml"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=message) as caught:
        load_recipes(file)
    assert str(file) in str(caught.value)
