"""Functions of users: losses and verifiers are found by the same spellings, and their files can be fingerprinted."""

import importlib
import sys
from pathlib import Path

import pytest

from trl_qtarget import build, user_code
from trl_qtarget.evaluation.verifiers import find_verifier


# a loss by its annotation, and a verifier by its parameters
BOTH = """
from trl_qtarget import Target

def both(completion=None, answer=None, row=None) -> Target:
    return Target()
"""


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """A working directory with modules and files of a user, another file in the home directory."""
    modules = ("my_module", "my-module", "my_space/inner-space/module", "my_package/__init__", "my_package/inner")
    files = [f"work/{module}.py" for module in modules] + ["work/my_folder.py/file.py", "home/file.py"]
    for name, text in {**dict.fromkeys(files, BOTH), "work/my_broken.py": "import no_module_of_that_name\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.startswith(("my_", "my-"))]:  # of another test's folder
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    yield tmp_path / "work"
    for name in set(sys.modules) - before:
        if name.startswith(("my_", "my-", "trl_qtarget_user_")):
            del sys.modules[name]


SPELLINGS = {
    "my_module": True,
    "my-module": True,
    "my_package.inner": True,
    "my_space.inner-space.module": True,
    "my_module.py": True,
    "./my_module.py": True,
    "my_package/inner.py": True,
    "{work}/my_module.py": True,
    "~/file.py": True,
    "no_module": False,
    "my_module.no_module": False,
    "my_package.no_module": False,
    "no_file.py": False,
    "my_folder.py": False,
    "~/no_file.py": False,
    "~nobody_of_that_name/file.py": False,
    "~/file": False,
    "my_package/inner": False,
    "./my_module": False,
    ".my_module": False,
    "my_package..inner": False,
    "": False,
}


@pytest.mark.parametrize(("source", "accepted"), SPELLINGS.items())
@pytest.mark.parametrize("find", [build, find_verifier])
def test_losses_and_verifiers_are_found_by_the_same_spellings(find, source, accepted, work):
    name = f"{source.format(work=work)}:both"
    if accepted:
        assert find(name) is not None
        return
    with pytest.raises(ValueError, match=r"^Unknown (loss|verifier) "):
        find(name)


@pytest.mark.parametrize("find", [build, find_verifier])
def test_the_same_reason_is_given(find):
    for source in ("no_module", "no_file.py", "~/file"):
        with pytest.raises(user_code.NotFound) as reason:
            user_code.load(source)
        with pytest.raises(ValueError, match=r"^Unknown ") as refused:
            find(f"{source}:both")
        assert f"{source}:both': {reason.value}. Give " in str(refused.value)


@pytest.mark.parametrize("find", [build, find_verifier])
@pytest.mark.parametrize("source", ["my_broken", "my_broken.py"])
def test_an_error_of_the_users_own_code_is_not_hidden(find, source):
    said = (
        rf"importing {source} failed with ModuleNotFoundError: .*no_module_of_that_name.* \(line 1 of .*my_broken.py\)"
    )
    with pytest.raises(ValueError, match=said) as refused:
        find(f"{source}:both")
    assert isinstance(refused.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(line 2 of "),
        ("def f(:\n", r"SyntaxError: .* \(line 1 of "),
        ("import json\n\njson.loads('{')\n", r"JSONDecodeError: .* \(line 3 of "),
        ("raise KeyboardInterruption\n", r"NameError: .* \(line 1 of "),
    ],
)
@pytest.mark.parametrize("find", [build, find_verifier])
def test_the_line_of_the_users_file_is_named(find, text, said, work):
    (work / "my_failing.py").write_text(text)
    with pytest.raises(ValueError, match=f"failed with {said}.*my_failing.py"):
        find("my_failing.py:both")


def test_a_file_is_executed_once():
    assert user_code.load("my_module.py") is user_code.load("./my_package/../my_module.py")


@pytest.mark.parametrize(("source", "accepted"), SPELLINGS.items())
def test_the_file_of_a_source_is_the_file_that_is_executed(source, accepted, work):
    source = source.format(work=work)
    found = user_code.file_of(source)
    assert (found is not None) == accepted
    if found is not None:
        assert found.samefile(str(user_code.load(source).__file__))


def test_an_installed_package_has_no_file_to_fingerprint():
    assert Path(str(pytest.__file__)).is_file()
    assert user_code.file_of("pytest") is None
