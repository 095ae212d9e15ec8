"""Files and folders appear complete or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trl_qtarget
from trl_qtarget.files import TEMPORARY, is_path, replacing, whole_folder, write_text


ROOT = Path(trl_qtarget.__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_replaces_the_old_version_and_makes_its_folder(tmp_path):
    file = tmp_path / "new" / "results.json"
    for text in ("old", "new: \u03c0\n"):
        write_text(file, text)
        assert file.read_bytes() == text.encode()
    assert names(file.parent) == ["results.json"]


def test_an_error_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    write_text(tmp_path / "results.json", "old")
    with pytest.raises(TypeError), replacing(tmp_path / "results.json") as file:
        file.writelines([b"half of the n", None])
    assert (tmp_path / "results.json").read_text() == "old"
    assert names(tmp_path) == ["results.json"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_takes_its_name_when_it_is_filled(tmp_path, exists):
    folder = tmp_path / "outputs" / "merged"
    if exists:
        folder.mkdir(parents=True)
    with whole_folder(folder) as unfinished:
        (unfinished / "config.json").write_text("{}")
        assert names(folder.parent) == sorted([unfinished.name, *(["merged"] if exists else [])])
    assert names(folder.parent) == ["merged"]
    assert names(folder) == ["config.json"]


def test_an_error_leaves_no_folder(tmp_path):
    def interrupted(folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "merged") as unfinished:
        interrupted(unfinished)
    assert names(tmp_path) == []


def test_a_folder_with_files_and_a_file_are_never_replaced(tmp_path):
    write_text(tmp_path / "folder" / "old", "old")
    write_text(tmp_path / "file", "old")
    for name in ("folder", "file"):
        with pytest.raises(OSError), whole_folder(tmp_path / name) as unfinished:  # noqa: PT011
            (unfinished / "config.json").write_text("{}")
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == ["old"]


KILLED = """
import os, signal, sys
from pathlib import Path
from trl_qtarget.files import replacing, whole_folder
with replacing(Path("results.json")) as file, whole_folder(Path("merged")) as unfinished:
    file.write(b"half of the n")
    file.flush()
    (unfinished / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_leaves_the_old_version(tmp_path):
    write_text(tmp_path / "results.json", "old")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, check=False)
    assert ended.returncode == -9
    assert (tmp_path / "results.json").read_text() == "old"
    left = [name for name in names(tmp_path) if name != "results.json"]
    assert len(left) == 2
    assert all(TEMPORARY.fullmatch(name) for name in left)


@pytest.mark.parametrize("name", ["~/m", "./m", "/m", "a/b/", "a/b/c", "a\\b"])
def test_names_that_can_only_be_paths(name):
    assert is_path(name)


@pytest.mark.parametrize("name", ["m", "owner/m", "m.v2", "owner/m-1.5b"])
def test_names_that_can_be_on_the_hub(name):
    assert not is_path(name)
