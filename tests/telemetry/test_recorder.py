"""What is counted is what happened, also from many threads; and there is an end to how many series there are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from meshlib.telemetry.label_sets import LABELS
from meshlib.telemetry.prometheus import Counted, Folder, merged, render
from meshlib.telemetry.recorder import BOUNDS, OVERFLOW, Recorder, Value

WALL = 1_700_000_000.0


def labels(code: str = "200", reporter: str = "source") -> tuple[str, ...]:
    return tuple({"reporter": reporter, "response_code": code}.get(name, "x") for name in LABELS)


def test_requests_of_many_threads_are_all_counted() -> None:
    """No increment is lost between threads."""
    recorder = Recorder(lambda: WALL)

    def work(code: int) -> None:
        for _ in range(2000):
            recorder.request(code, lambda: labels(str(code)), 0.003, 10, 20)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [200, 500] * 4))
    assert {each.labels[LABELS.index("response_code")]: each.count for each in recorder.series()} == {
        "200": 8000,
        "500": 8000,
    }


def test_a_request_falls_in_the_first_bucket_that_holds_it() -> None:
    """Prometheus' `le` is inclusive, and milliseconds are whole, as Istio's are."""
    recorder = Recorder(lambda: WALL)
    recorder.request("", labels, 0.0059, 100, 101)
    [series] = recorder.series()
    assert series.durations.index(1) == BOUNDS.index(5.0)
    assert series.requests.index(1) == BOUNDS.index(100.0)
    assert series.responses.index(1) == BOUNDS.index(250.0)
    assert (series.milliseconds, series.request_bytes, series.response_bytes) == (5, 100, 101)


def test_what_exceeds_the_bound_is_counted_together_and_seen() -> None:
    """Sums stay true when labels explode, and a counter says that they have."""
    recorder = Recorder(lambda: WALL, max_series=3)
    for number in range(10):
        recorder.request(number, lambda number=number: labels(str(number)), 0.001, 0, 0)  # type: ignore[misc]
    series = recorder.series()
    assert len(series) == 4 and sum(each.count for each in series) == 10
    assert series[-1].labels == ("source", *(OVERFLOW,) * (len(LABELS) - 1)) and series[-1].count == 7
    assert recorder.counts()["meshlib_telemetry_series_overflow_total", ()] == 7


def test_the_exposition_is_istios() -> None:
    """Names, buckets without `.0`, cumulative; nothing but grpc_response_status may be empty."""
    recorder = Recorder(lambda: WALL)
    recorder.request("", labels, 0.03, 10, 20)
    text = render(Counted(recorder.series(), []))
    assert 'istio_requests_total{reporter="source"' in text
    bounds = [
        line.partition('le="')[2].partition('"')[0] for line in text.splitlines() if "milliseconds_bucket" in line
    ]
    assert ",".join(bounds) == (
        "0.5,1,5,10,25,50,100,250,500,1000,2500,5000,10000,30000,60000,300000,600000,1800000,3600000,+Inf"
    )
    assert 'le="25"} 0' in text and 'le="50"} 1' in text


def test_exemplars_are_told_to_those_who_ask_for_openmetrics() -> None:
    """The older format has no place for them."""
    recorder = Recorder(lambda: WALL)
    recorder.request("", labels, 0.03, 10, 20, ("ab" * 16, "cd" * 8))
    counted = Counted(recorder.series(), [])
    assert "ab" * 16 not in render(counted)
    text = render(counted, openmetrics=True)
    assert f'le="50"}} 1 # {{trace_id="{"ab" * 16}",span_id="{"cd" * 8}"}} 30 {WALL:.3f}' in text
    assert "# TYPE istio_requests counter" in text and text.endswith("# EOF\n")


def test_processes_are_added_up() -> None:
    """Workers behind one port count as one."""
    parts = []
    for _ in range(3):
        recorder = Recorder(lambda: WALL)
        recorder.request("", labels, 0.03, 10, 20)
        parts.append(Counted(recorder.series(), [Value("meshlib_retries_total", (), 2, True)]))
    whole = merged(parts)
    assert whole.series[0].count == 3 and sum(whole.series[0].durations) == 3
    assert whole.values == [Value("meshlib_retries_total", (), 6, True)]


def test_what_ended_processes_left_is_put_together(tmp_path: Path) -> None:
    """A server that renews its workers for months keeps a few files, and every count."""
    recorder = Recorder(lambda: WALL)
    recorder.request("", labels, 0.03, 10, 20)
    ended = Counted(recorder.series(), [Value("meshlib_requests_in_flight", (), 3, False)])
    here = Folder(tmp_path)
    for number in range(20):
        here._write(tmp_path / f"{2**22 + 1 + number}-ended.counts", ended)  # above the kernel's largest process id
    here.fold()
    assert len(list(tmp_path.iterdir())) == 1
    found = merged(here.others())
    assert found.series[0].count == 20 and found.values == []
