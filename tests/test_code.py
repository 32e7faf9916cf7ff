"What code says, what it reaches, and what is installed: every change that counts is seen, and none that does not."

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlops_workbench.closure import find_place, imported_files, place_name, project_code
from mlops_workbench.code import (
    Memory,
    environment_digest,
    notebook_code,
    open_memory,
    place_digest,
    read_environment,
    read_notebook,
    read_python,
    save_memory,
)
from mlops_workbench.core import digest_file, digest_folder
from mlops_workbench.settings import Settings


def notebook(*cells, tags=(), kernel="python3"):
    made = [{"cell_type": "code", "source": text, "metadata": {"tags": list(tags)}} for text in cells]
    return json.dumps({"cells": made, "metadata": {"kernelspec": {"name": kernel}}}).encode()


def same(a, b):
    return read_notebook(notebook(*a)).digest == read_notebook(notebook(*b)).digest


# What Python says


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n\n\ny = 2\n",
        "# note\nx = 1; y = 2",
        "x = (\n    1\n)  # one\ny = 2  # type: int",
        "# -*- coding: utf-8 -*-\nx=1\ny=2",
    ],
)
def test_the_same_program_has_one_digest(text):
    assert read_python(text.encode()) == read_python(b"x = 1\ny = 2\n")


@pytest.mark.parametrize(
    "text",
    [
        "x = 1.0\ny = 2",
        "x = True\ny = 2",
        "y = 2\nx = 1",
        "x = '1'\ny = 2",
        "'doc'\nx = 1\ny = 2",
        "x = 1\ny = 2\nz = 3",
        "x: int = 1\ny = 2",
    ],
)
def test_another_program_has_another_digest(text):
    assert read_python(text.encode()).digest != read_python(b"x = 1\ny = 2\n").digest


def test_an_encoding_counts():
    latin, utf8 = (f"# -*- coding: {name} -*-\nx = '\xe9'".encode("latin-1") for name in ("latin-1", "cp1251"))
    assert read_python(latin).digest != read_python(utf8).digest


def test_what_is_no_python_counts_as_it_stands():
    assert read_python(b"x = (\n").digest != read_python(b"x = ( \n").digest
    assert read_python(b"\x00").digest != read_python(b"\x00\x00").digest


def test_a_tree_too_deep_counts_as_text():
    deep = ("x = " + "+".join(["1"] * 20_000)).encode()
    assert read_python(deep).digest != read_python(deep + b"+1").digest


# What a notebook says


def test_order_and_tags_and_kernel_count():
    assert not same(["a = 1", "b = 2"], ["b = 2", "a = 1"])
    assert read_notebook(notebook("a = 1", tags=["parameters"])).digest != read_notebook(notebook("a = 1")).digest
    assert read_notebook(notebook("a = 1", kernel="r")).digest != read_notebook(notebook("a = 1")).digest


@pytest.mark.parametrize(
    "before, after, is_same",
    [
        ("%run a.py\nx = 1", "%run a.py\nx = 1  # one", True),
        ("%run a.py\nx = 1", "%run a.py --fast\nx = 1", False),
        ("!pip list", "!pip freeze", False),
        ("x = !ls", "x = !ls  -l", False),
        ("%%bash\nls # all", "%%bash\nls # some", False),
        ("%%time\nx = 1", "%%time\nx = 2", False),
        ("x?", "y?", False),
        ("await f()", "await f()  # later", True),
        ("await f()", "await g()", False),
        ('x = """\n%a\n"""', 'x = """\n%b\n"""', False),
        ('%a\nx = """\n# in a text\n"""', '%a\nx = """\n# other\n"""', False),
        ("%a\n__magic__('%b')", "__magic__('%a')\n__magic__('%b')", False),
        ("  x = 1", "  x = 2", False),
    ],
)
def test_magics_never_hide_a_change(before, after, is_same):
    assert same([before], [after]) == is_same


def test_a_range_counts_and_the_words_around_it_do_not():
    marks = [
        read_notebook(notebook(f"rank: int = 8  # {comment}", tags=["parameters"])).digest
        for comment in (
            "of it; in [1, 8]",
            "of the matrices; in [1, 8]",
            "of it; in [1, 9]",
            "of it; in (1, 8]",
            "of it",
        )
    ]
    assert marks[0] == marks[1] and len(set(marks)) == 4


def test_an_executed_copy_says_what_its_template_says(tmp_path):
    template = {"cells": [{"cell_type": "code", "source": ["x = 1\n", "y = 2"], "metadata": {}, "id": "a"}]}
    executed = {"cells": [template["cells"][0] | {"id": "b", "execution_count": 7, "outputs": [{"text": "1"}]}]}
    executed["cells"].insert(0, {"cell_type": "markdown", "source": "words", "metadata": {}})
    for name, content in (("a", template), ("b", executed)):
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(content))
    assert notebook_code(tmp_path / "a.ipynb") == notebook_code(tmp_path / "b.ipynb")


def test_a_notebook_without_any_metadata_is_one():
    bare = {"cells": [{"cell_type": "code", "source": "x = 1", "metadata": None}], "metadata": None}
    assert read_notebook(json.dumps(bare).encode()).digest == read_notebook(notebook("x = 1", kernel="")).digest


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"no json", b'{"cells": [1]}', b'{"cells": 3}', b'{"cells": [{}]}']
)
def test_what_is_no_notebook_still_has_a_digest(data):
    assert read_notebook(data).digest != read_notebook(data + b" ").digest


# What is remembered


def remembered(tmp_path, n=3):
    settings = Settings("local", tmp_path, tmp_path / "home")
    memory = open_memory(settings)
    for i in range(n):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}")
        memory.source(str(tmp_path / f"m{i}.py"))
    save_memory(memory)
    return settings


def test_what_is_remembered_is_read_again(tmp_path, monkeypatch):
    settings = remembered(tmp_path)
    monkeypatch.setattr("mlops_workbench.code.read_python", None)
    with pytest.raises(AttributeError):
        Memory().source(str(tmp_path / "m0.py"))
    monkeypatch.undo()
    assert len(open_memory(settings).known["sources"]) == 3


@pytest.mark.parametrize("damage", [lambda t: t[:50], lambda t: t.replace("a", "b"), lambda t: "", lambda t: "{}\n{}"])
def test_a_damaged_memory_is_forgotten(tmp_path, damage):
    settings = remembered(tmp_path)
    path = settings.home / "cache" / "code.json"
    path.write_text(damage(path.read_text()))
    memory = open_memory(settings)
    assert memory.known["sources"] == {}
    assert memory.source(str(tmp_path / "m1.py")) == read_python(b"x = 1")
    save_memory(memory)
    assert len(open_memory(settings).known["sources"]) == 1


def test_processes_do_not_take_each_others_memory(tmp_path):
    settings = remembered(tmp_path, n=0)

    def remember(i):
        memory = open_memory(settings)
        (tmp_path / f"t{i}.py").write_text(f"y = {i}")
        memory.source(str(tmp_path / f"t{i}.py"))
        save_memory(memory)

    threads = [threading.Thread(target=remember, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(open_memory(settings).known["sources"]) <= 8  # whole, whoever came last
    assert [p.name for p in (settings.home / "cache").iterdir()] == ["code.json"]


def test_a_memory_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "home").write_text("a file where a folder is wanted")
    remembered(tmp_path)


def age(path, seconds):
    "A file's change time cannot be set: wait until it is old enough."
    time.sleep(max(0.0, seconds - (time.time() - path.stat().st_ctime)))


def test_a_young_big_file_is_read_each_time(tmp_path):
    path, memory = tmp_path / "big.bin", Memory()
    path.write_bytes(bytes(2 << 20))
    before = path.stat()
    first = memory.digest(str(path))
    assert memory.known["files"] == {}
    path.write_bytes(b"\x01" + bytes((2 << 20) - 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert memory.digest(str(path)) != first


def test_an_old_big_file_is_read_once_and_seen_when_it_changes(tmp_path):
    path, memory = tmp_path / "big.bin", Memory()
    path.write_bytes(bytes(2 << 20))
    age(path, 2.1)
    before, first = path.stat(), memory.digest(str(path))
    assert list(memory.known["files"]) == [str(path)]
    memory.known["files"][str(path)][-1] = "as remembered"
    assert memory.digest(str(path)) == "as remembered"
    path.write_bytes(b"\x01" + bytes((2 << 20) - 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the change time tells all the same
    assert memory.digest(str(path)) not in ("as remembered", first)


# Places


def test_places_are_digested_as_core_does(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    (tmp_path / ".hidden").write_text("y")
    assert place_digest(tmp_path) == digest_folder(tmp_path)
    assert place_digest(tmp_path / "a" / "x.txt") == digest_file(tmp_path / "a" / "x.txt")
    assert place_digest(tmp_path / "nothing") is None


def test_a_remote_place_is_compared_by_what_the_storage_says():
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe({"/cache-test/a.txt": b"one", "/cache-test/b.txt": b"two"})
    first = place_digest("memory://cache-test")
    assert first == place_digest("memory://cache-test")
    files.pipe("/cache-test/b.txt", b"three")
    assert place_digest("memory://cache-test") not in (None, first)
    files.rm("/cache-test", recursive=True)
    assert place_digest("memory://cache-test") is None


# The closure

BASE = {
    "work.ipynb": "import lib.a",
    "lib/__init__.py": "",
    "lib/a.py": "x = 1",
    "lib/b.py": "x = 2",
    "lib/sub/__init__.py": "",
    "lib/sub/c.py": "x = 3",
    "top.py": "x = 4",
    "stuff/d.py": "x = 5",
}


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(notebook(*text.split("\n===\n")).decode() if name.endswith(".ipynb") else text)


def reached(root, files, task="", values=()):
    write(root, BASE | files)
    settings = Settings("local", root, root / ".workbench")
    found = project_code(settings, root / "work.ipynb", task, values, Memory())
    return {name for name in found if not name.startswith(("mlops_workbench/", "/"))}


CHAIN = {"lib/__init__.py", "lib/a.py"}


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, CHAIN),
        ({"work.ipynb": "from lib import a"}, CHAIN),
        ({"work.ipynb": "from lib.sub import c"}, {"lib/__init__.py", "lib/sub/__init__.py", "lib/sub/c.py"}),
        ({"work.ipynb": "def f():\n    import top"}, {"top.py"}),
        ({"work.ipynb": "try:\n    import nothing\nexcept ImportError:\n    import top"}, {"top.py"}),
        ({"work.ipynb": "import importlib\nimportlib.import_module('top')"}, {"top.py"}),
        ({"work.ipynb": "__import__('top')"}, {"top.py"}),
        ({"work.ipynb": "x = 'lib.a:x'"}, CHAIN),
        ({"work.ipynb": "%run top.py"}, {"top.py"}),
        ({"work.ipynb": "%%time\nimport top"}, {"top.py"}),
        ({"work.ipynb": "!python -m lib.a"}, CHAIN),
        ({"work.ipynb": "x = !ls\nimport top"}, {"top.py"}),
        ({"work.ipynb": "from runpy import run_path\nrun_path('top.py')"}, {"top.py"}),
        ({"work.ipynb": "import top", "top.py": "import lib.a"}, {"top.py", *CHAIN}),
        ({"lib/a.py": "from . import b"}, {*CHAIN, "lib/b.py"}),
        ({"lib/a.py": "from .b import x"}, {*CHAIN, "lib/b.py"}),
        ({"lib/a.py": "from .sub.c import x"}, {*CHAIN, "lib/sub/__init__.py", "lib/sub/c.py"}),
        ({"work.ipynb": "import lib.sub.c", "lib/sub/c.py": "from .. import b"},
         {"lib/__init__.py", "lib/sub/__init__.py", "lib/sub/c.py", "lib/b.py"}),
        ({"work.ipynb": "from lib import *"}, {"lib/__init__.py"}),
        ({"work.ipynb": "from lib import *", "lib/__init__.py": "__all__ = ['a']"}, CHAIN),
        ({"work.ipynb": "from lib import *", "lib/__init__.py": "__all__: list = []\n__all__.append('a')"}, CHAIN),
        ({"work.ipynb": "from lib import *", "lib/__init__.py": "__all__ = [n for n in find()]"},
         {*CHAIN, "lib/b.py", "lib/sub/__init__.py"}),
        ({"work.ipynb": "import pkgutil\nimport lib\nlist(pkgutil.iter_modules(lib.__path__))"},
         {*CHAIN, "lib/b.py", "lib/sub/__init__.py"}),
        ({"lib/a.py": "__all__ = ['b']"}, CHAIN),
        ({"work.ipynb": "import lib", "lib/__init__.py": "x = __all__ = []\n__all__[:0] = ['a']"}, CHAIN),
        ({"work.ipynb": "import lib", "lib/__init__.py": "__all__: list\ndel __all__\n[].sort()"}, {"lib/__init__.py"}),
        ({"work.ipynb": "import sys\nsys.path[:0] = ['stuff']\n===\nimport d"}, {"stuff/d.py"}),
        ({"lib/table.csv": "1", "lib/sub/q.sql": "2", "lib/__pycache__/a.pyc": "3", "lib/.x": "4"},
         {*CHAIN, "lib/table.csv", "lib/sub/q.sql"}),
        ({"work.ipynb": "import top", "top.py": "open('t.csv')", "t.csv": "1", "u.csv": "1"}, {"top.py", "t.csv"}),
        ({"work.ipynb": "import sys\nsys.path.insert(0, 'stuff')\n===\nimport d"}, {"stuff/d.py"}),
        ({"work.ipynb": "import sys\nfrom pathlib import Path\nsys.path.append(str(Path('.') / 'stuff'))\n===\nimport d"},
         {"stuff/d.py"}),
        ({"work.ipynb": "import stuff.d"}, {"stuff/d.py"}),
        ({"work.ipynb": "import stuff", "stuff.py": "x = 1"}, {"stuff.py"}),
        ({"work.ipynb": "import lib.a", "lib/a.py": "import top", "top.py": "import lib.a"}, {*CHAIN, "top.py"}),
        ({"work.ipynb": "import json\nimport psycopg"}, set()),
        ({"work.ipynb": "import json", "json.py": "x = 1"}, {"json.py"}),
        ({"work.ipynb": "%run other.ipynb", "other.ipynb": "import top"}, {"other.ipynb", "top.py"}),
    ],
)  # fmt: skip
def test_every_way_to_reach_a_file_is_followed(tmp_path, files, expected):
    assert reached(tmp_path, files) == expected


def test_a_long_chain_of_imports_is_followed(tmp_path):
    chain = {f"m{i}.py": f"import m{i + 1}" for i in range(3000)} | {"work.ipynb": "import m0"}
    assert len(reached(tmp_path, chain)) == 3000


def test_the_task_and_modules_among_the_parameters_are_reached(tmp_path):
    assert reached(tmp_path, {"work.ipynb": "1"}, task="lib.sub.c") == {
        "lib/__init__.py",
        "lib/sub/__init__.py",
        "lib/sub/c.py",
    }
    assert reached(tmp_path, {"work.ipynb": "1"}, values=["top", "lora", "some words", "numpy"]) == {"top.py"}


def test_an_installed_package_counts_only_if_it_is_the_tasks(tmp_path, monkeypatch):
    site = tmp_path / "env" / "site-packages"
    write(site, {"shop_a/__init__.py": "", "shop_a/rules.py": "from shop_b import x", "shop_b.py": "x = 1"})
    monkeypatch.syspath_prepend(str(site))
    files = {"work.ipynb": "from shop_a import rules"}
    assert reached(tmp_path / "project", files) == set()
    assert reached(tmp_path / "project", files, task="shop_a.rules") == {"shop_a/__init__.py", "shop_a/rules.py"}


def test_an_editable_install_is_the_projects(tmp_path, monkeypatch):
    write(tmp_path / "elsewhere", {"tools/__init__.py": "", "tools/saw.py": "x = 1"})
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    write(tmp_path / "project", BASE | {"work.ipynb": "import tools.saw"})
    settings = Settings("local", tmp_path / "project", tmp_path / "project" / ".workbench")
    found = project_code(settings, tmp_path / "project" / "work.ipynb", "", [], Memory())
    assert {"tools/__init__.py", "tools/saw.py"} <= set(found)


def test_this_library_counts_wherever_it_is(tmp_path):
    write(tmp_path, BASE | {"work.ipynb": "from mlops_workbench.features import FeatureSet"})
    settings = Settings("local", tmp_path, tmp_path / ".workbench")
    found = {Path(n).name for n in project_code(settings, tmp_path / "work.ipynb", "", [], Memory())}
    assert {"features.py", "store.py", "core.py", "0001_events.sql"} <= found and "cli.py" not in found


def test_local_state_is_no_part_of_a_package(tmp_path):
    write(tmp_path, BASE | {"lib/state/x.csv": "1"})
    settings = Settings("local", tmp_path, tmp_path / "lib" / "state")
    assert "lib/state/x.csv" not in project_code(settings, tmp_path / "work.ipynb", "", [], Memory())


def test_nothing_is_imported_to_find_out(tmp_path):
    write(
        tmp_path, BASE | {"lib/__init__.py": "raise SystemExit('imported')", "lib/a.py": "raise SystemExit('imported')"}
    )
    assert reached(tmp_path, {"lib/__init__.py": "raise SystemExit('imported')"}) == CHAIN


def test_a_name_leads_back_to_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    for name in ("project/a.py", "other/a.py", "other/b.py", "nowhere/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
        path = str(tmp_path / name)
        assert find_place(place_name(path, tmp_path / "project"), tmp_path / "project") == path


def test_a_kernel_tells_what_it_imported(tmp_path):
    write(tmp_path, BASE)
    script = "import sys; sys.path.insert(0, sys.argv[1]); import lib.a, json, psycopg\n"
    script += "from pathlib import Path; from mlops_workbench.closure import imported_files\n"
    script += "print(imported_files(Path(sys.argv[1])))"
    found = subprocess.check_output([sys.executable, "-c", script, str(tmp_path)], text=True)
    assert "'lib/__init__.py', 'lib/a.py'" in found and "psycopg" not in found and "closure.py" in found
    assert "mlops_workbench" in " ".join(imported_files(tmp_path))


# The environment


def test_another_version_is_another_environment(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    (site / "ratelib-1.0.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site))
    before = environment_digest()
    assert "ratelib-1.0" in read_environment() and environment_digest() == before
    (site / "ratelib-1.0.dist-info").rename(site / "ratelib-1.1.dist-info")
    assert environment_digest() != before


def test_what_was_installed_from_a_folder_counts_by_its_files(tmp_path, monkeypatch):
    dist = tmp_path / "site-packages" / "mine-0.1.dist-info"
    dist.mkdir(parents=True)
    (dist / "direct_url.json").write_text("{}")
    (dist / "RECORD").write_text("mine.py,sha256=aaa,3\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    before = environment_digest()
    (dist / "RECORD").write_text("mine.py,sha256=bbb,3\n")
    assert environment_digest() != before


def test_an_editable_install_counts_by_its_code_alone(tmp_path, monkeypatch):
    dist = tmp_path / "site-packages" / "mine-0.1.dist-info"
    dist.mkdir(parents=True)
    (dist / "direct_url.json").write_text('{"dir_info": {"editable": true}, "url": "file:///mine"}')
    (dist / "RECORD").write_text("__editable__.mine.pth,sha256=aaa,3\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    assert "mine-0.1" in read_environment()


def test_the_way_to_a_key_imports_nothing_heavy():
    script = "import sys, mlops_workbench.cache; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["pandas", "numpy", "pyarrow", "mlflow", "pydantic", "torch", "fsspec", "matplotlib"]
    assert subprocess.check_output([sys.executable, "-c", script, *heavy], text=True).strip() == "[]"
