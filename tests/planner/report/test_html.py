"""The HTML report: one self-contained, accessible file with everything in the folder."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from planner.domain.errors import InvalidInput
from planner.report.html import write_report
from planner.report.results import save_results
from tests.planner.report.samples import results, write_folder

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check that the innermost tag is closed."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note text."""
        self.words.append(data)

    @property
    def text(self) -> str:
        """All text of the page."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of all tags of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Return the report of a full folder."""
    folder = write_folder(tmp_path_factory.mktemp("full"))
    out = write_report(folder, folder / "report.html")
    return Page(out.read_text(encoding="utf-8"))


def test_nothing_comes_from_outside(page: Page) -> None:
    """No script, no link, and every picture is inline."""
    assert not page.all("script")
    assert not page.all("link")
    images = page.all("img")
    assert len(images) == 7
    assert all(str(one["src"]).startswith("data:image/png;base64,") for one in images)


def test_accessible(page: Page) -> None:
    """Language, one main heading, sections in order, alternative texts, scoped table heads."""
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert len(page.all("h2")) == 8
    assert all(len(str(one["alt"])) > 40 for one in page.all("img"))
    assert all(one.get("scope") in ("col", "row") for one in page.all("th"))


def test_says_what_matters(page: Page) -> None:
    """Table, verdicts, plan, placement, predictors, settings, dilation and notes are there."""
    for words in (
        "Three seeds <by hand>",
        "-10.0% [-10.0%, -10.0%] win",
        "best baseline",
        "proven least (bound) 9.500 s",
        "gap 5.00%",
        "output tokens",
        "dilated by a factor of 4",
        "3 seeds per policy",
        "A note & more.",
        "theta = 1.5",
        "Simulated twin",
        "Run s0-r",
    ):
        assert words in page.text


def test_losses_are_as_plain_as_wins(tmp_path: Path) -> None:
    """A loss stands in the first paragraph with the same mark as a win would."""
    folder = write_folder(tmp_path / "loss", factor=1.3)
    text = write_report(folder, tmp_path / "loss.html").read_text(encoding="utf-8")
    first = text.partition("<header>")[2].partition("</header>")[0]
    assert "30.0% more than marginal_cost" in first
    assert '<span class="verdict loss">loss</span>' in first


def test_same_folder_same_bytes(tmp_path: Path) -> None:
    """The report depends on the folder alone."""
    folder = write_folder(tmp_path / "in")
    first = write_report(folder, tmp_path / "a.html").read_bytes()
    assert write_report(folder, tmp_path / "b.html").read_bytes() == first


def test_a_folder_with_results_alone_is_enough(tmp_path: Path) -> None:
    """What is not there is left out."""
    save_results(results(), tmp_path)
    text = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("img")) == 2
    assert "Workflow" not in page.text


def test_a_broken_part_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    """A malformed optional file or a missing trace is one error; no half report is left."""
    folder = write_folder(tmp_path / "in")
    out = tmp_path / "report.html"
    (folder / "plan.json").write_text(json.dumps({"schema": "other"}))
    with pytest.raises(InvalidInput, match="plan.json: not a plan file"):
        write_report(folder, out)
    (folder / "plan.json").unlink()
    (folder / "traces" / "almanac-1.jsonl").unlink()
    with pytest.raises(InvalidInput, match=r"almanac-1\.jsonl: no such trace"):
        write_report(folder, out)
    assert not out.exists()


def test_no_folder(tmp_path: Path) -> None:
    """A folder that does not exist is one clear error."""
    with pytest.raises(InvalidInput, match="no such folder"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")
