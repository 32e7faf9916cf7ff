"Live views: what stands on the screen, that it fits, and that the terminal is left as it was found."

import io
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_workbench.live import LiveView, choose_view, live_view, run_html, run_lines, widget_view
from mlops_workbench.story import JsonLines, PlainLines, RunState, StageState, take_event

NAMES = ["prep", "train", "evaluate", "promote"]
START = {"event": "run_started", "run_id": "r-1", "pipeline": "planner", "profile": "smoke", "stages": NAMES}
TRAIN = {"event": "stage_started", "stage": "train", "cells": 7}
STEP = {"event": "step", "stage": "train", "step": 60, "max_steps": 240, "values": {"loss": 1.92}, "left_s": 30}

statuses = st.sampled_from(["waiting", "running", "finished", "cached", "skipped", "failed", "pruned", "new"])
stages = st.builds(
    StageState,
    name=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z", "M"]), min_size=1, max_size=30),
    status=statuses,
    cell=st.integers(0, 9),
    cells=st.integers(0, 9),
    title=st.sampled_from(["", "Learn", "Was die Leute taten", "学習する"]),
    step=st.integers(0, 300),
    max_steps=st.integers(0, 200),
    values=st.dictionaries(st.sampled_from(["loss", "validation_loss"]), st.floats()),
    begun_s=st.one_of(st.none(), st.floats(0, 9)),
    said=st.sampled_from(["", "n_rows 1500", "ValueError: " + "no rows " * 30]),
)


def state_of(*told):
    state = RunState()
    for moment, event in enumerate(told):
        take_event(state, event, float(moment))
    return state


def texts(state, width, **options):
    return [line.plain for line in run_lines(state, width, now_s=10.0, **options)]


@given(st.lists(stages, max_size=12), st.integers(20, 200))
def test_no_line_is_wider_than_the_screen(found, width):
    state = RunState("r-1", "planner", "smoke", stages={stage.name: stage for stage in found})
    assert all(line.cell_len <= width for line in run_lines(state, width, now_s=10.0))


@given(st.lists(stages, min_size=1, max_size=40), st.integers(6, 60), st.integers(20, 120))
def test_no_drawing_is_higher_than_the_screen(found, height, width):
    state = RunState("r-1", "planner", stages={stage.name: stage for stage in found})
    assert len(run_lines(state, width, now_s=10.0, height=height)) < height


def test_on_a_low_screen_the_running_stage_stays():
    names = [f"trial-{i}" for i in range(30)]
    told = state_of(
        START | {"stages": names}, *({"event": "stage_started", "stage": n, "cells": 3} for n in names[:20])
    )
    for name in names[:19]:
        take_event(told, {"event": "stage_finished", "stage": name, "seconds": 1.0}, 30.0)
    drawn = texts(told, 80, height=10)
    assert any("trial-19" in line for line in drawn)
    assert [line for line in drawn if "above" in line or "below" in line] == [" … 16 above", " … 8 below"]


def test_a_wide_screen_has_a_line_for_each_stage_and_a_narrow_one_two():
    told = state_of(START, TRAIN, STEP)
    assert texts(told, 100)[2] == " ● train           9 s  ━━━━────────────  step 60/240, loss 1.92, 22 s left"
    assert texts(told, 44)[2:4] == [" ● train           9 s", "   ━━──────  step 60/240, loss 1.92, 22 s l…"]


def test_an_error_is_never_cut():
    error = "stage 'train' failed in cell 5: ValueError: the loss is not finite: choose a smaller learning_rate"
    told = state_of(START, TRAIN, {"event": "stage_failed", "stage": "train", "error": error, "status": "failed"})
    for width in (30, 60, 120):
        assert error in " ".join(line.strip() for line in texts(told, width)).replace("  ", " ")


# A terminal


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


SCRIPT = """
import sys, time
from mlops_workbench.live import choose_view
start = {start!r}
with choose_view(sys.stdout, variables={{"TERM": "xterm"}}) as listen:
    listen(start)
    listen({{"event": "stage_started", "stage": "prep", "cells": 3}})
    time.sleep(0.3)
    {body}
"""


def in_terminal(body, columns=80, rows=24, send=None):
    "Run a script with a terminal as its output; its exit code and all that was written."
    import fcntl
    import pty
    import termios

    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    variables = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    code = SCRIPT.format(start=START, body=textwrap.dedent(body).replace("\n", "\n    "))
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=variables | {"TERM": "xterm"})
    os.close(other)
    written = b""
    while True:
        try:
            written += (chunk := os.read(main, 65536))
        except OSError:
            break
        if not chunk:
            break
        if send and b"WAITING" in written:
            child.send_signal(send)
            send = None
    os.close(main)
    return child.wait(60), written.decode()


def visible(written):
    "What is left on the screen: the text behind the last time that the frame was erased, without colours."
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.split("\x1b[2K")[-1]).replace("\r", "")


def cursor_is_back(written):
    return written.count("\x1b[?25l") == 1 and written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_a_run_ends_with_its_table_and_the_cursor_back():
    body = """
    listen({"event": "note", "text": "the cluster is [full]"})
    print("a library prints")
    listen({"event": "stage_finished", "stage": "prep", "seconds": 3.1, "outputs": {"n_rows": 1500}})
    listen({"event": "run_finished", "run_id": "r-1", "status": "finished", "seconds": 4.0})
    """
    code, written = in_terminal(body)
    assert code == 0 and cursor_is_back(written)
    assert visible(written).splitlines() == [
        "planner smoke  finished  4.0 s  r-1",
        " ✓ prep          3.1 s  n_rows 1500",
        " · train",
        " · evaluate",
        " · promote",
    ]
    assert "the cluster is [full]" in written and "a library prints" in written


def test_the_cursor_is_back_after_an_error():
    code, written = in_terminal("raise ValueError('no rows')")
    assert code == 1 and cursor_is_back(written)
    assert "■ prep" in visible(written) and "ValueError: no rows" in written


def test_the_cursor_is_back_after_an_interrupt():
    body = """
    listen({"event": "note", "text": "WAITING"})
    time.sleep(30)
    """
    code, written = in_terminal(body, send=signal.SIGINT)
    assert code != 0 and cursor_is_back(written)
    assert "planner smoke  stopped" in visible(written)


def test_forty_columns_are_enough():
    code, written = in_terminal("listen({'event': 'stage_finished', 'stage': 'prep', 'seconds': 3.1})", columns=40)
    assert code == 0
    assert max(map(len, visible(written).splitlines())) < 40


def test_many_events_are_drawn_a_few_times():
    frames = []

    class Counted(LiveView):
        def open(self):
            pass

        def draw(self, whole=False):
            frames.append(self.state.stages["train"].step)

        def close(self):
            self.draw()

    begun = time.monotonic()
    with Counted(io.StringIO()) as listen:
        listen(START)
        for step in range(20_000):
            listen(STEP | {"step": step})
    assert len(frames) <= 2 + 8 * (time.monotonic() - begun)
    assert frames[-1] == 19_999


def test_a_terminal_that_is_gone_does_not_stop_a_run():
    class Fragile(Terminal):
        gone = False

        def write(self, text):
            if self.gone:
                raise OSError(5, "Input/output error")
            return super().write(text)

    stream, before = Fragile(), sys.stdout
    with pytest.raises(ZeroDivisionError), LiveView(stream) as listen:
        listen(START)
        stream.gone = True
        time.sleep(0.3)
        listen(STEP)
        1 / 0  # noqa: B018  the run's own error is the one that is told
    assert sys.stdout is before


# Choosing


class Ascii(Terminal):
    encoding = "ascii"


@pytest.mark.parametrize(
    ("stream", "json", "variables", "kind"),
    [
        (Terminal(), False, {"TERM": "xterm"}, LiveView),
        (Terminal(), True, {"TERM": "xterm"}, JsonLines),
        (Terminal(), False, {"TERM": "xterm", "NO_COLOR": "1"}, PlainLines),
        (Terminal(), False, {"TERM": "xterm", "NO_COLOR": ""}, LiveView),
        (Terminal(), False, {"TERM": "dumb"}, PlainLines),
        (Terminal(), False, {}, PlainLines),
        (Ascii(), False, {"TERM": "xterm"}, PlainLines),
        (io.StringIO(), False, {"TERM": "xterm"}, PlainLines),
    ],
)
def test_the_view_suits_where_the_output_goes(stream, json, variables, kind):
    assert type(choose_view(stream, json, variables)) is kind


def test_choosing_lines_imports_no_drawing_library():
    code = "import io, sys; from mlops_workbench.live import choose_view; choose_view(io.StringIO());"
    code += "print([m for m in ('rich', 'IPython', 'ipywidgets', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# A notebook


def test_the_html_escapes_what_it_is_told():
    told = state_of(
        START | {"pipeline": "<b>", "stages": ["<i>"]}, {"event": "stage_failed", "stage": "<i>", "error": "<u>"}
    )
    assert not re.search("<[biu]>(?!&lt;)", run_html(told, 1.0))


def test_the_widget_shows_each_stage_and_leaves_html_behind(monkeypatch):
    class Place:
        shown = None

        def update(self, what):
            self.shown = what.data

    place = Place()
    monkeypatch.setattr("IPython.display.display", lambda box, display_id: place)
    with widget_view() as listen:
        for event in (START, TRAIN, STEP, {"event": "note", "text": "resumed <here>"}):
            listen(event)
        listen.draw()
        rows = {row.children[0].value: row.children[1:] for row in listen._box.children[1:-1]}
        assert [re.sub("<[^>]+>", "", name) for name in rows] == [" ".join(p) for p in zip("·●··", NAMES, strict=True)]
        bar, told = list(rows.values())[1]
        assert bar.value == 0.25 and bar.layout.visibility == "visible"
        assert "step 60/240, loss 1.92" in told.value
    assert "stopped" in place.shown and "resumed &lt;here&gt;" in place.shown


def test_a_live_view_can_be_made_for_standard_output():
    assert live_view().stream is sys.stdout
