"""The model report: pictures and one self-contained page."""

from planner.report.drawing import to_png
from planner.report.model_page import write_model_page
from planner.report.model_plots import calibration_plot, latency_plot, reliability_plot

LEVELS = (0.05, 0.5, 0.9)
CALIBRATION = [
    {"kind": "calibration", "name": f"length, set {number}, {when}", "promised": LEVELS,
     "observed": (0.04, 0.52, 0.88), "weight": ()}
    for number in range(9)
    for when in ("offline", "online")
]  # fmt: skip
RELIABILITY = [
    {"kind": "reliability", "name": f"branching, {name}", "promised": (0.1, 0.8),
     "observed": (0.12, 0.7), "weight": (30.0, 10.0)}
    for name in "abcd"
]  # fmt: skip
LATENCY = [
    {"kind": "latency", "name": "engine", "promised": (0.1, 1.0, 30.0),
     "observed": (0.12, 0.9, 33.0), "weight": ()}
]  # fmt: skip
BARS = [
    {"name": "a < b", "value": 12.0, "unit": "%", "bar": ">= 10", "holds": True, "note": ""},
    {"name": "c", "value": 1.0, "unit": "s", "bar": "<= 0.5", "holds": False, "note": "slow"},
    {"name": "d", "value": None, "unit": "1", "bar": "", "holds": None, "note": "no data"},
]


def test_axes_have_units_and_every_set_a_line():
    """Each picture labels its axes with units; nine sets give nine distinct lines."""
    drawn = (
        calibration_plot(CALIBRATION), reliability_plot(RELIABILITY), latency_plot(LATENCY),
    )  # fmt: skip
    for figure in drawn:
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert all("(" in axes.get_xlabel() for axes in shown)
    lines = drawn[0].axes[0].get_lines()[1:]
    looks = {(one.get_color(), str(one.get_linestyle()), one.get_marker()) for one in lines}
    assert len(looks) == 9


def test_the_page_is_whole_and_stable(tmp_path):
    """One file without external assets, missed bars marked, the same data the same bytes."""
    curves = [*CALIBRATION, *RELIABILITY, *LATENCY]
    names = [path.name for path in write_model_page(BARS, curves, tmp_path / "one")]
    assert names == [
        "report.html", "bars.json", "calibration.png", "reliability.png", "latency.png",
    ]  # fmt: skip
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert "1 of 2 bars hold" in page
    assert "a &lt; b" in page
    assert 'class="missed"' in page
    assert "src=" in page
    assert 'src="http' not in page
    write_model_page(BARS, curves, tmp_path / "two")
    assert page == (tmp_path / "two" / "report.html").read_text(encoding="utf-8")
    assert to_png(latency_plot(LATENCY)).startswith(b"\x89PNG")


def test_without_curves_there_is_a_page(tmp_path):
    """Bars alone are enough."""
    assert len(write_model_page(BARS, [], tmp_path)) == 2
