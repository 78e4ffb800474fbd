"""Clock, metrics text, breaker, run book and trace writer."""

from __future__ import annotations

import json

import pytest

from planner.domain.errors import InvalidInput
from planner.domain.trace import BranchRecord, RunRecord, load_trace
from runtime.clock import Clock
from runtime.config import GatewayConfig
from runtime.prometheus import Counter, Gauge, Histogram, Registry
from runtime.runs import Run, RunBook
from runtime.traces import TraceWriter


class TestClock:
    def test_dilation_multiplies_elapsed_time(self):
        """A clock starts at 0 and counts `dilation` seconds per wall second."""
        wall = iter([100.0, 100.0, 102.5])
        clock = Clock(4.0, wall=lambda: next(wall))
        assert clock.now_s() == 0.0
        assert clock.now_s() == 10.0
        assert clock.wall_s(10.0) == 2.5

    @pytest.mark.parametrize("dilation", [0.0, -1.0, float("nan"), float("inf")])
    def test_bad_dilation_is_refused(self, dilation):
        """A dilation that is not a positive number is an input error."""
        with pytest.raises(InvalidInput, match="dilation"):
            Clock(dilation)


class TestConfig:
    @pytest.mark.parametrize("field", ["dilation", "hold_timeout_s", "max_body_bytes"])
    def test_values_out_of_range_are_named(self, field):
        """A setting out of range is an input error that names the setting."""
        with pytest.raises(InvalidInput, match=field):
            GatewayConfig(**{field: 0})

    def test_an_empty_admin_key_is_refused(self):
        """An empty key would open the admin routes to everyone, so it is refused."""
        with pytest.raises(InvalidInput, match="admin_key"):
            GatewayConfig(admin_key="")


class TestPrometheus:
    def test_labels_cannot_grow_without_end(self):
        """Beyond the limit further label combinations count together as `other`."""
        counter = Counter("c_total", "Things", ("who", "what"))
        histogram = Histogram("h", "Sizes", (1,), ("who",))
        registry = Registry((counter, histogram), label_limit=3)
        for number in range(10):
            counter.inc(f"client{number}", "x")
            histogram.observe(0.5, f"client{number}")
        counter.inc("client1", "x")
        lines = registry.render().splitlines()
        assert [line for line in lines if line.startswith("c_total")] == [
            'c_total{who="client0",what="x"} 1',
            'c_total{who="client1",what="x"} 2',
            'c_total{who="client2",what="x"} 1',
            'c_total{who="other",what="other"} 7',
        ]
        assert 'h_count{who="other"} 7' in lines

    def test_text_format(self):
        """Metrics render with type, escaped labels, cumulative buckets, sum and count."""
        counter = Counter("c_total", "Things", ("kind",))
        counter.inc('a"b\n', by=2)
        gauge = Gauge("g", "Level")
        gauge.set(0.5)
        histogram = Histogram("h", "Sizes", (1, 2), ("x",))
        for value in (0.5, 1.0, 1.5, 9.0):
            histogram.observe(value, "y")
        assert Registry((counter, gauge, histogram)).render().splitlines() == [
            "# HELP c_total Things",
            "# TYPE c_total counter",
            'c_total{kind="a\\"b\\n"} 2',
            "# HELP g Level",
            "# TYPE g gauge",
            "g 0.5",
            "# HELP h Sizes",
            "# TYPE h histogram",
            'h_bucket{x="y",le="1"} 2',
            'h_bucket{x="y",le="2"} 3',
            'h_bucket{x="y",le="+Inf"} 4',
            'h_sum{x="y"} 12',
            'h_count{x="y"} 4',
        ]


def make_run(run_id="r", arrival_s=1.0):
    return Run(
        run_id=run_id,
        workflow="w",
        workflow_hash="h",
        session_id="s",
        arrival_s=arrival_s,
        predicted_s=3.0,
        last_s=arrival_s,
    )


class TestRunBook:
    def test_a_run_ends_once_and_stays_known(self):
        """The end of a run gives its record once; a late look-up still finds the run."""
        book = RunBook()
        run = make_run()
        run.calls = 2
        book.add(run)
        record = book.end("r", 9.0, "ok")
        assert record == RunRecord(
            run_id="r",
            workflow="w",
            workflow_hash="h",
            arrival_s=1.0,
            finish_s=9.0,
            session_id="s",
            predicted_s=3.0,
            calls=2,
        )
        assert book.end("r", 10.0, "ok") is None
        assert book.find("r") is run
        assert len(book) == 0

    def test_silent_runs_expire_as_of_their_last_sign(self):
        """A run without open calls ends by silence, at the instant it was last heard of."""
        book = RunBook()
        silent, busy = make_run("silent"), make_run("busy")
        silent.last_s = 4.0
        busy.open_calls = 1
        book.add(silent)
        book.add(busy)
        (record,) = book.expire(100.0, 50.0)
        assert (record.run_id, record.finish_s) == ("silent", 4.0)
        assert book.find("busy") is busy

    def test_tools_pair_start_and_end_by_node_and_visit(self):
        """A tool record spans its own start and end; an end without start gives none."""
        book = RunBook()
        run = make_run()
        book.tool_started(run, "search", 0, 2.0)
        book.tool_started(run, "search", 1, 3.0)
        record = book.tool_ended(run, "search", 1, 5.0, "ok")
        assert record is not None
        assert (record.start_s, record.finish_s) == (3.0, 5.0)
        assert book.tool_ended(run, "search", 7, 5.0, "ok") is None


def branch(time_s):
    return BranchRecord(run_id="r", workflow_hash="h", branch="b", outcome="o", time_s=time_s)


class TestTraceWriter:
    def test_lines_are_readable_at_any_moment(self, tmp_path):
        """Each record is on disk when `write` returns, on a clock that starts with the file."""
        path = tmp_path / "new" / "t.jsonl"
        writer = TraceWriter(path, now_s=100.0, header={"policy": "x"})
        writer.write(branch(101.5))
        assert load_trace(path) == [branch(1.5)]
        assert json.loads(path.read_text().splitlines()[0])["policy"] == "x"
        writer.close()

    def test_what_began_before_is_left_out(self, tmp_path):
        """A record of something older than the file is not written."""
        writer = TraceWriter(tmp_path / "t", now_s=100.0, header={})
        writer.write(branch(99.0))
        writer.close()
        assert load_trace(tmp_path / "t") == []

    def test_a_torn_line_is_cut_off_and_the_clock_goes_on(self, tmp_path):
        """After a crash the file continues: half a line goes, later times follow the last."""
        path = tmp_path / "t"
        writer = TraceWriter(path, now_s=0.0, header={})
        writer.write(branch(7.0))
        writer.close()
        with path.open("a") as file:
            file.write('{"type":"bra')
        writer = TraceWriter(path, now_s=2.0, header={"ignored": True})
        writer.write(branch(3.0))
        writer.close()
        assert load_trace(path) == [branch(7.0), branch(8.0)]

    @pytest.mark.parametrize("content", ["not a trace\n", "no newline", '{"schema": "x"}\n'])
    def test_another_file_is_never_touched(self, tmp_path, content):
        """A file that is not a trace stays as it is, and the error names it."""
        path = tmp_path / "precious"
        path.write_text(content)
        with pytest.raises(InvalidInput, match="precious"):
            TraceWriter(path, now_s=0.0, header={})
        assert path.read_text() == content

    def test_a_folder_is_an_input_error(self, tmp_path):
        """A path that cannot be a file gives one clear error."""
        with pytest.raises(InvalidInput, match="cannot write the trace"):
            TraceWriter(tmp_path, now_s=0.0, header={})
