"Progress: what it shows a person, what it tells the engine, and that a resumed history is the whole history."

import json
import math

import pytest

from mlops_workbench import progress as module
from mlops_workbench.progress import PROGRESS_MIME, Progress, time_left


class Display:
    "Stands for the kernel's display: keeps every bundle."

    def __init__(self):
        self.bundles = []

    def __call__(self, bundle, raw, display_id):
        self.bundles.append(bundle)
        return self

    def update(self, bundle, raw):
        self.bundles.append(bundle)


@pytest.fixture
def kernel(monkeypatch):
    "Pretend to be inside a kernel, with a clock that moves 0.1 s each time it is read."
    display, clock = Display(), iter(range(1, 10_000))
    monkeypatch.setattr("IPython.get_ipython", lambda: type("Shell", (), {"kernel": object()})())
    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(module.time, "monotonic", lambda: 100 + next(clock) / 10)
    return display


def told(display):
    return [bundle[PROGRESS_MIME] for bundle in display.bundles]


def test_a_kernel_is_told_twice_a_second_and_at_the_end(kernel):
    progress = Progress(100)
    for step in range(1, 101):
        progress(step, {"loss": 1 / step})
    progress.close()
    steps = [facts["step"] for facts in told(kernel)]
    assert steps[0] == 1 and steps[-1] == 100
    assert all(b - a == 5 for a, b in zip(steps[:-2], steps[1:-1], strict=True)), "one reading of the clock a step"


def test_each_display_holds_the_line_and_the_numbers(kernel):
    Progress(4)(2, {"loss": 0.5, "validation_loss": math.nan})
    bundle = kernel.bundles[0]
    assert bundle["text/plain"].endswith("step 2/4, loss 0.500, validation loss nan, 0 s left")
    facts = json.loads(json.dumps(bundle[PROGRESS_MIME], allow_nan=False))
    assert facts == {"step": 2, "max_steps": 4, "values": {"loss": 0.5}, "left_s": pytest.approx(0.1)}


def test_outside_a_kernel_a_line_is_printed_at_each_tenth(capsys):
    progress = Progress(1000)
    for step in range(1, 1001):
        progress(step, {"loss": 1.0})
    progress.close()
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_a_resumed_history_is_the_whole_history_and_reports_only_what_is_new():
    whole, heard = Progress(4), []
    for step in range(1, 5):
        whole(step, {"loss": 1 / step})
    resumed = Progress(4, report=lambda step, values: heard.append(step))
    resumed.restore(json.loads(json.dumps({step: whole.rows[step] for step in (1, 2, 3)})))
    resumed(4, {"loss": 1 / 4})
    assert resumed.rows == whole.rows and resumed.history.equals(whole.history)
    assert heard == [4]


def test_what_is_restored_is_not_shared():
    rows = {1: {"loss": 1.0}}
    progress = Progress(4)
    progress.restore(rows)
    progress(1, {"validation_loss": 2.0})
    assert rows == {1: {"loss": 1.0}}


def test_time_left_counts_from_where_the_work_was_resumed():
    assert time_left(50, 100, seconds=10) == 10
    assert time_left(50, 100, seconds=10, first=40) == 50
    assert time_left(40, 100, seconds=10, first=40) is None
    assert time_left(100, 100, seconds=10) is None
