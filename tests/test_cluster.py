"A real Ray of several nodes on this machine: placing, telling, losing a node, failing, stopping."

import json
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mlops_workbench import cookbook
from mlops_workbench.cluster import (
    Baggage,
    Cluster,
    NodeCrew,
    _one_line,
    cancel,
    check_reach,
    connect,
    disconnect,
    find_cluster,
    find_crew,
    submit,
    wait,
)
from mlops_workbench.core import WorkbenchError
from mlops_workbench.engine import execute_notebook
from mlops_workbench.execution import Execution
from mlops_workbench.node import read_source
from mlops_workbench.plan import Resources
from mlops_workbench.replay import share, untuned_predictor
from mlops_workbench.settings import Settings, read_settings
from mlops_workbench.store import open_store
from mlops_workbench.task import load_task
from mlops_workbench.tracking import end_run, open_tracking, start_run

ROOT = Path(__file__).resolve().parent.parent

SHOP = """
import os
import subprocess
import time
from pathlib import Path


def note(marks, text):
    with open(marks, "a") as file:
        file.write(text + "\\n")


def where(place):
    return place.home.name, os.environ.get("CUDA_VISIBLE_DEVICES"), place.variables, str(place.root)


def tells(place, n):
    for i in range(n):
        place.tell({"event": "step", "step": i})
    (place.folder / "out" / "menu.txt").parent.mkdir()
    (place.folder / "out" / "menu.txt").write_text((place.folder / "order.txt").read_text().upper())
    return n


def holds(place, marks, go):
    note(marks, place.home.name)
    place.tell({"event": "note", "text": "began"})
    try:
        while not Path(go).exists():
            time.sleep(0.05)
    except KeyboardInterrupt:
        (place.folder / "partial.txt").write_text("half")
        note(marks, "interrupted")
        raise
    return place.home.name


def fails(place, marks):
    note(marks, "began")
    (place.folder / "partial.txt").write_text("half")
    raise LookupError("there is no soup")


def stays(place, marks):
    child = subprocess.Popen(["sleep", "600"])
    note(marks, str(child.pid))
    while True:
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            note(marks, "interrupted")


def notebook(place, name, parameters):
    from mlops_workbench.engine import execute_notebook
    from mlops_workbench.execution import Execution

    execution = Execution(place.folder / "done.ipynb", place.variables, place.folder, listen=place.tell)
    return execute_notebook(place.folder / name, parameters, execution)["outputs"]


def dies(place, marks):
    note(marks, "began")
    if len(Path(marks).read_text().split()) == 1:
        os._exit(7)
    return "again"
"""


def start():
    "Start a head and two nodes; only they have two cores, and only the last one has a GPU."
    from ray.cluster_utils import Cluster as Raylets

    quick = {
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 4,
        "health_check_initial_delay_ms": 500,
    }
    small = {"object_store_memory": 80 * 2**20}
    raylets = Raylets()
    raylets.add_node(num_cpus=1, include_dashboard=False, _system_config=quick, **small)
    nodes = [raylets.add_node(num_cpus=2, num_gpus=gpus, **small) for gpus in (0, 1)]
    return raylets, nodes


@pytest.fixture(scope="module")
def raylets():
    pytest.importorskip("ray")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    try:
        found = start()
    except Exception:  # a raylet that is not up within 15 s on a busy machine: Ray gives up
        found = start()
    homes = [node.node_id[:12] for node in [found[0].head_node, *found[1]]]
    yield found
    disconnect()
    found[0].shutdown()
    for home in homes:
        shutil.rmtree(Path(tempfile.gettempdir(), f"workbench-node-{os.getuid()}", home), ignore_errors=True)


@pytest.fixture
def cluster(raylets):
    return connect(raylets[0].address)


@pytest.fixture
def shop(tmp_path):
    root = tmp_path / "shop"
    root.mkdir()
    (root / "settings.ini").write_text("[local]\n")
    (root / "shop.py").write_text(SHOP)
    return Baggage(source=read_source(root))


@pytest.fixture
def marks(tmp_path):
    return tmp_path / "marks"


def until(happens, seconds=60):
    "Wait for something that another process does."
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


# Without a cluster


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_that_is_not_there_is_told_in_one_line(address):
    with pytest.raises(WorkbenchError, match="no Ray cluster at .* refused.*--engine local") as told:
        connect(address.format(free_port()))
    assert "\n" not in str(told.value)


def test_a_machine_without_a_cluster_is_told_in_one_line_and_ray_says_nothing(tmp_path):
    pytest.importorskip("ray")
    code = (
        "from mlops_workbench.cluster import connect\ntry:\n    connect('auto')\nexcept Exception as e:\n    print(e)"
    )
    variables = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TMPDIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=variables)
    assert ran.stderr == ""
    # another cluster may run on the developer's machine: then it is joined and nothing is printed
    assert ran.stdout == "" or (ran.stdout.startswith("no Ray cluster") and ran.stdout.count("\n") == 1)


def test_a_port_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("mlops_workbench.cluster._WAIT_S", 0.3)
    words = pytest.raises(WorkbenchError, match="no Ray cluster at .*nothing answers")
    with socket.create_server(("127.0.0.1", 0)) as silent, words:
        find_cluster(f"127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("address", ["", "head", "head:", ":6379", "ray://", "head:port", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises((ValueError, WorkbenchError), match="ray_address is|no Ray cluster at"):
        find_cluster(address)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray._private.services", None)
    with pytest.raises(WorkbenchError, match=r"pip install 'mlops_workbench\[ray\]'"):
        find_cluster("auto")


@pytest.mark.parametrize(
    "error, words",
    [
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.50.0\n    Python: 3.11.7\n"),
            "it runs another version of Ray or Python than this machine: install the same there (Version mismatch: The",
        ),
        (ValueError("Ray Client requires pip package `ray[client]`. If"), "pip install 'ray[client]'"),
        (OSError("no\nroute"), "OSError: no route"),
    ],
)
def test_what_ray_says_is_told_in_one_line(error, words):
    assert words in _one_line(error) and "\n" not in _one_line(error)


class Away(Cluster):
    def nodes(self):
        return [{"address": "203.0.113.7", "resources": {"CPU": 4.0}}]


def test_a_private_database_is_refused_for_nodes_elsewhere():
    away = Away("203.0.113.1:6379", None, "")
    with pytest.raises(WorkbenchError, match="node 203.0.113.7 cannot reach the database"):
        check_reach(away, "postgresql://postgres@/workbench?host=/run/pg&port=5432")
    check_reach(away, "postgresql://me@db.example.org/workbench")


# With one


@pytest.mark.slow
def test_a_function_runs_where_its_resources_are(cluster, shop):
    with_gpu = Resources(gpu=1.0)
    places = [wait(submit(cluster, "shop:where", (), with_gpu, shop)) for _ in range(2)]
    assert [p[1] for p in places] == ["0", "0"]
    assert places[0][0] == places[1][0], "only one node has a GPU"
    with pytest.raises(WorkbenchError, match="no node has 1 cores, 3 GPUs.*the largest has 2 cores, 1 GPUs"):
        submit(cluster, "shop:where", (), Resources(gpu=3.0), shop)
    with pytest.raises(WorkbenchError, match="no node has 1 cores"):
        submit(cluster, "shop:where", (), Resources(memory_mb=2**30), shop)


@pytest.mark.slow
def test_events_arrive_in_order_and_files_travel_both_ways(cluster, shop):
    heard = []
    handle = submit(cluster, "shop:tells", (200,), Resources(), replace(shop, files={"order.txt": b"soup"}))
    assert wait(handle, heard.append) == 200
    assert [e["step"] for e in heard] == list(range(200))
    assert handle.files == {"order.txt": b"soup", "out/menu.txt": b"SOUP"}


@pytest.mark.slow
def test_a_node_gets_the_variables_and_a_home_of_its_own(cluster, shop):
    home, _, variables, root = wait(submit(cluster, "shop:where", (), Resources(), replace(shop, variables={"A": "b"})))
    assert variables["A"] == "b"
    assert variables["WORKBENCH_ROOT"] == root == shop.source.place
    assert Path(variables["WORKBENCH_HOME"]).name == home


@pytest.mark.slow
def test_a_node_without_the_project_gets_the_drivers(cluster, shop, tmp_path):
    (tmp_path / "shop" / "fresh.py").write_text("def where(place):\n    return str(place.root), place.variables\n")
    source = read_source(tmp_path / "shop")
    cluster.sent[source.digest] = cluster.sent.get(source.digest)  # packed by hand below: its place is hidden
    import ray

    from mlops_workbench.node import pack_source

    cluster.sent[source.digest] = ray.put(pack_source(source))
    os.rename(tmp_path / "shop", tmp_path / "hidden")
    root, variables = wait(submit(cluster, "fresh:where", (), Resources(), Baggage(source=source)))
    assert root != str(tmp_path / "shop") and "workbench-node-" in root
    assert variables["WORKBENCH_ROOT"] == root == variables["PYTHONPATH"]
    assert Path(root, "shop.py").read_text() == SHOP


@pytest.mark.slow
def test_a_node_with_other_packages_is_refused(cluster, shop):
    other = replace(cluster, packages="torch==0.1\n" + cluster.packages.replace("torch==", "torchless=="))
    with pytest.raises(
        WorkbenchError, match="has other packages.*torch .* instead of 0.1.*install the same lock there"
    ):
        wait(submit(other, "shop:where", (), Resources(), shop))


@pytest.mark.slow
def test_a_node_that_does_not_see_the_artefacts_is_refused(cluster, shop):
    with pytest.raises(WorkbenchError, match="does not see /nowhere/artifacts: mount it there"):
        wait(submit(cluster, "shop:where", (), Resources(), replace(shop, places=("/nowhere/artifacts",))))


@pytest.mark.slow
def test_an_error_of_the_function_is_raised_here_and_not_tried_again(cluster, shop, marks):
    handle = submit(cluster, "shop:fails", (str(marks),), Resources(), shop)
    with pytest.raises(LookupError, match="there is no soup"):
        wait(handle)
    assert marks.read_text() == "began\n"
    assert handle.files == {"partial.txt": b"half"}
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        wait(submit(cluster, "nowhere:f", (), Resources(), shop))


@pytest.mark.slow
def test_a_lost_worker_is_tried_again(cluster, shop, marks):
    heard = []
    assert wait(submit(cluster, "shop:dies", (str(marks),), Resources(), shop), heard.append) == "again"
    assert marks.read_text() == "began\nbegan\n"
    assert [e["text"].split(": ")[1].split()[0] for e in heard] == ["again"]
    marks.unlink()
    with pytest.raises(WorkbenchError, match="shop:dies lost its worker each time"):
        wait(submit(cluster, "shop:dies", (str(marks),), Resources(), shop, retries=0))


@pytest.mark.slow
def test_whoever_listens_can_stop_a_function(cluster, shop, marks, tmp_path):
    def enough(event):
        raise InterruptedError("pruned")

    handle = submit(cluster, "shop:holds", (str(marks), str(tmp_path / "go")), Resources(), shop)
    with pytest.raises(InterruptedError, match="pruned"):
        wait(handle, enough)
    assert marks.read_text().split()[1] == "interrupted"
    assert handle.files == {"partial.txt": b"half"}
    with pytest.raises(WorkbenchError, match="was cancelled"):
        wait(handle)


@pytest.mark.slow
def test_a_function_that_does_not_stop_is_killed_with_what_it_started(cluster, shop, marks):
    handle = submit(cluster, "shop:stays", (str(marks),), Resources(), shop)
    until(marks.exists)
    cancel(handle, grace_s=2.0)
    assert marks.read_text().split()[1] == "interrupted"
    until(lambda: not psutil.pid_exists(int(marks.read_text().split()[0])))
    with pytest.raises(WorkbenchError, match="was cancelled|lost its worker"):
        wait(handle)


@pytest.mark.slow
def test_a_function_in_the_queue_can_be_cancelled(cluster, shop, marks, tmp_path):
    go = tmp_path / "go"
    held = [submit(cluster, "shop:holds", (str(marks), str(go)), Resources(cpu=2.0), shop) for _ in range(3)]
    until(lambda: marks.exists() and len(marks.read_text().split()) == 2)
    cancel(held[2])
    go.touch()
    assert len({wait(held[0]), wait(held[1])}) == 2, "two nodes with two cores each"
    with pytest.raises(WorkbenchError, match="was cancelled"):
        wait(held[2])


@pytest.mark.slow
def test_a_driver_joins_in_silence_and_leaves_nothing(raylets, shop, marks, tmp_path):
    code = f"""
        from mlops_workbench.cluster import *
        from mlops_workbench.node import read_source
        from mlops_workbench.plan import Resources
        from pathlib import Path
        shop = Baggage(read_source(Path({shop.source.place!r})), {{'order.txt': b''}})
        cluster = connect({raylets[0].address!r})
        print(wait(submit(cluster, 'shop:tells', (2,), Resources(), shop)))
        submit(cluster, 'shop:holds', ({str(marks)!r}, '/nowhere'), Resources(), shop)
        import time, os
        while not os.path.exists({str(marks)!r}): time.sleep(0.05)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert (ran.stdout, ran.stderr) == ("2\n", "")
    until(lambda: not [p for p in psutil.process_iter(["cmdline"]) if "ray::shop:holds" in (p.info["cmdline"] or ())])


def cell(source, *tags):
    return {
        "cell_type": "code",
        "metadata": {"tags": list(tags)},
        "source": source,
        "outputs": [],
        "id": f"c{len(source)}",
    }


def template(*sources):
    "Write a notebook that takes a number and says what it made of it."
    cells = [cell("n: int = 2", "parameters"), *(cell(s) for s in sources)]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    content = {"cells": [c | {"execution_count": None} for c in cells], "metadata": {"kernelspec": kernel}}
    return json.dumps(content | {"nbformat": 4, "nbformat_minor": 5}).encode()


RECORD = "import json, os\njson.dump({'outputs': {'half': n / 2}}, open(os.environ['WORKBENCH_OUTPUTS'], 'w'))"


def said(notebook):
    return [c["outputs"] for c in json.loads(notebook)["cells"]]


@pytest.mark.slow
def test_a_notebook_gives_the_same_here_and_there(cluster, shop, tmp_path):
    random_numbers = (
        "import numpy as np\nr = np.random.default_rng(n)\n(r.random((300, 300)) @ r.random((300, 300))).sum()"
    )
    content, heard = template(random_numbers, "import os\nos.environ.get('OMP_NUM_THREADS')", RECORD), []
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "half.ipynb").write_bytes(content)
    execution = Execution(tmp_path / "work" / "done.ipynb", {}, tmp_path / "work")
    here = execute_notebook(tmp_path / "work" / "half.ipynb", {"n": 7}, execution)["outputs"]
    handle = submit(
        cluster, "shop:notebook", ("half.ipynb", {"n": 7}), Resources(), replace(shop, files={"half.ipynb": content})
    )
    assert wait(handle, heard.append) == here == {"half": 3.5}
    assert said(handle.files["done.ipynb"]) == said((tmp_path / "work" / "done.ipynb").read_bytes())
    assert [e["event"] for e in heard].count("cell_finished") >= 4


ASK = """
import json, os
from mlops_workbench.cluster import Baggage, find_crew, submit, wait
from mlops_workbench.settings import read_settings
crew = find_crew(read_settings(), task="shop", version=1)
free = crew.size()
there = wait(submit(crew.cluster, "shop:where", (), baggage=crew.baggage))
outputs = {"free": free, "root": there[3], "home": there[0] != os.path.basename(os.environ["WORKBENCH_HOME"])}
json.dump({"outputs": outputs}, open(os.environ["WORKBENCH_OUTPUTS"], "w"))
"""


@pytest.mark.slow
def test_a_notebook_on_a_node_may_ask_the_others(cluster, shop):
    variables = {"WORKBENCH_RAY_ADDRESS": cluster.address, "WORKBENCH_ENVIRONMENT": "local"}
    baggage = replace(shop, files={"ask.ipynb": template(ASK)}, variables=variables)
    handle = submit(cluster, "shop:notebook", ("ask.ipynb", {"n": 7}), Resources(cpu=2.0), baggage)
    outputs = wait(handle)
    assert outputs["free"] == 3, "five cores, and the notebook holds two"
    assert outputs["root"] == shop.source.place and outputs["home"] is True


@pytest.mark.slow
def test_stopping_a_notebook_stops_its_kernel_too(cluster, shop, marks):
    stay = f"import os, time\nopen({str(marks)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    baggage, heard = replace(shop, files={"stay.ipynb": template(stay)}), []

    def enough(event):
        heard.append(event)
        if marks.exists() and marks.read_text():
            raise InterruptedError("pruned")

    handle = submit(cluster, "shop:notebook", ("stay.ipynb", {"n": 7}), Resources(), baggage)
    until(lambda: marks.exists() and marks.read_text())
    with pytest.raises(InterruptedError):
        wait(handle, enough)
    until(lambda: not psutil.pid_exists(int(marks.read_text())))
    assert json.loads(handle.files["done.ipynb"])["cells"], "what was executed until then comes back"


@pytest.mark.slow
def test_a_replay_on_many_nodes_gives_the_same_answers(cluster, monkeypatch):
    settings, task = read_settings(root=ROOT), load_task("mlops_workbench.planner")
    alone = untuned_predictor(task, "planner-base", settings)
    rng = random.Random(0)
    contexts = [cookbook.draw_context(rng) for _ in range(100)]
    monkeypatch.setenv("WORKBENCH_RAY_ADDRESS", cluster.address)
    crew = find_crew(settings, Resources(cpu=2.0), task="mlops_workbench.planner", base="planner-base")
    until(lambda: crew.size() == 2)
    asked, ask = [], NodeCrew.ask
    monkeypatch.setattr(NodeCrew, "ask", lambda crew, some, here: asked.extend(some) or ask(crew, some, here))
    for constrained in (True, False):
        here, there = (who.answer(contexts, constrained, 16) for who in (alone, share(alone, crew)))
        assert [(a.value, a.text) for a in there] == [(a.value, a.text) for a in here]
    assert [len(shard.arguments[0]) for shard in asked] == [32, 36, 32, 36], "whole batches, two shards elsewhere"


class Repeats:
    def answer(self, contexts, constrained=True, batch_size=32):
        return [c["number"] for c in contexts]


@pytest.mark.slow
def test_a_node_finds_a_version_by_itself(empty_url, tmp_path, monkeypatch):
    from mlops_workbench import registry
    from mlops_workbench.node import Place
    from mlops_workbench.replay import Shard

    (tmp_path / "settings.ini").write_text("[local]\n")
    settings = Settings("local", tmp_path, tmp_path / "here", empty_url, str(tmp_path / "shelf"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    task = load_task("mlops_workbench.planner")
    with open_store(settings) as store:
        run = start_run(open_tracking(store, settings), "planner", "train", {})
        registry.register_model(run, task, "mlops_workbench.planner", tmp_path / "model", "d" * 64)
        end_run(run)
    names = {
        "ROOT": tmp_path,
        "HOME": tmp_path / "there",
        "DATABASE_URL": empty_url,
        "ARTIFACTS_URL": settings.artifacts,
    }
    variables = {f"WORKBENCH_{name}": str(value) for name, value in names.items()}
    loaded = []
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registry, "load_predictor", lambda folder, task, settings: loaded.append(folder) or Repeats())
    place = Place(tmp_path, tmp_path / "there", tmp_path, variables, print)
    shard = Shard("answer", ([{"number": 1}, {"number": 2}], True, 32))
    for _ in range(2):
        who = {"task": "mlops_workbench.planner", "version": 1}
        assert registry.answer_elsewhere(place, who, shard) == [1, 2]
    (folder,) = loaded
    assert folder.is_relative_to(tmp_path / "there"), "fetched once, into the node's home"


@pytest.mark.slow
def test_a_lost_node_is_replaced_by_another(raylets, cluster, shop, tmp_path, capfd):
    import ray

    def hold(name):
        marks, go = tmp_path / f"{name}.marks", tmp_path / f"{name}.go"
        handle = submit(cluster, "shop:holds", (str(marks), str(go)), Resources(cpu=2.0), shop)
        until(marks.exists)
        return handle, go, lambda: marks.read_text().split()

    own, heard, other = ray.get_runtime_context().get_node_id(), [], None
    handle, go, marks = hold("a")
    if own.startswith(marks()[0]):  # the node that this process hangs on must stay
        other = go
        handle, go, marks = hold("b")
    (lost,) = [n for n in raylets[1] if n.node_id.startswith(marks()[0])]
    raylets[0].remove_node(lost, allow_graceful=False)
    if other:
        other.touch()
    until(lambda: len(marks()) == 2)
    go.touch()
    assert wait(handle, heard.append) == marks()[1] != marks()[0]
    assert any("was lost: again on" in e["text"] for e in heard)
    assert "raylet" not in "".join(capfd.readouterr()), "Ray tells it on the terminal"
