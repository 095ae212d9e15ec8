"""Private names of other packages occur in `trl_qtarget/compat` alone, where each is listed with its feature.

A name is private when it begins with an underscore, when it is in a module that its package does not document, when it
is one of `UNPROMISED`, or when it is a method of a host that a subclass overrides: a host may rename any of them
without a word. Elsewhere in the package such a name is read only as `self._name` or `super()._name`, and then
`compat.NAMES` or `compat.TRAINER_ATTRIBUTES` must list it.
"""

import ast
import importlib
import pkgutil
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from trl_qtarget import compat


PACKAGE = Path(compat.__file__).parents[1]
HOSTS = ("trl", "transformers", "accelerate", "peft", "datasets", "deepspeed", "huggingface_hub")
DOCUMENTED = {  # modules of hosts, beside the top ones, that their own documentation imports from
    "accelerate.logging", "accelerate.utils", "transformers.trainer_utils", "transformers.utils", "trl.rewards",
}  # fmt: skip
UNPROMISED = {"ds_id", "ds_shape", "ds_status", "dataclass_types", "check_target_module_exists"}
NAMEDTUPLE = {"_asdict", "_fields", "_make", "_replace"}  # documented in spite of the underscore
LISTED = {name.rpartition(":")[2].rpartition(".")[2] for name in compat.PARAMETERS} | {*compat.TRAINER_ATTRIBUTES}


@dataclass(frozen=True)
class Allowed:
    """Names that some files may use without compat, and the reason."""

    files: tuple[str, ...]
    names: frozenset[str]
    reason: str


ALLOWED = [
    Allowed(
        ("loss/chunked.py",),
        frozenset({"_C", "_autograd", "_get_current_graph_task_keep_graph"}),
        "torch is the only package that the loss imports; without the name it assumes that the graph is kept",
    ),
    Allowed(
        ("options/", "cli/"),
        frozenset({
            "_SubParsersAction", "_actions", "_add_action", "_format_action_invocation", "_group_actions",
            "_option_string_actions", "_optionals",
        }),
        "argparse is the standard library's, and has no public way to list or to regroup the options of a parser",
    ),
]  # fmt: skip


@dataclass
class Scan:
    """The private names of other packages that one module uses, and the lines."""

    file: str  # relative to the package
    tree: ast.Module
    own: frozenset[str] = frozenset()
    found: list[tuple[int, str, str]] = field(default_factory=list)  # line, name, how it is used

    def run(self) -> "Scan":
        self.imported = dict(self._imports())
        docstrings = {id(node.value) for node in ast.walk(self.tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._import(node)
            elif isinstance(node, ast.Attribute):
                self._attribute(node.lineno, node.value, node.attr)
            elif isinstance(node, ast.ClassDef):
                self._overrides(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                self._text(node.lineno, node.value)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant):
                    self._attribute(node.lineno, node.args[0], name.value)
        return self

    def _add(self, line: int, name: str, how: str) -> None:
        if not any(name in a.names and self.file.startswith(a.files) for a in ALLOWED):
            self.found.append((line, name, how))

    # Imports

    def _imports(self):
        """Yield each imported name with the `module:name` that it stands for."""
        here = ["trl_qtarget", *Path(self.file).parts[:-1]]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                above = ".".join(here[: len(here) + 1 - node.level]) if node.level else ""
                module = ".".join(filter(None, [above, node.module]))
                yield from ((alias.asname or alias.name, f"{module}:{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((alias.asname or alias.name, alias.name) for alias in node.names)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.ImportFrom) and node.level:
            return
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for module in modules:
            if moving(module):
                self._add(node.lineno, module, "a module that its package does not document")
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in (*HOSTS, "torch"):
            for alias in node.names:
                if private(alias.name) or alias.name in UNPROMISED:
                    self._add(node.lineno, alias.name, f"imported from {node.module}")

    # Attributes and texts

    def _attribute(self, line: int, owner: ast.expr, name: str) -> None:
        inside = ast.unparse(owner) in ("self", "cls", "super()")
        if name in UNPROMISED and not inside:
            self._add(line, name, f"of {ast.unparse(owner)}")
        if not private(name) or name in NAMEDTUPLE:
            return
        # an override is the host's name; a name with "qtarget" was put on another package's object by this one
        of_this_package = "qtarget" in name or (name in self.own and (inside or name not in LISTED))
        if not of_this_package and not (inside and name in LISTED):
            self._add(line, name, f"of {ast.unparse(owner)}")

    def _text(self, line: int, text: str) -> None:
        """Report a private name in quotation marks: an attribute for `getattr`, or a module to import by name."""
        if text in UNPROMISED or (text in LISTED and private(text)) or text == "_no_split_modules":
            self._add(line, text, "as a text")
        if re.fullmatch(rf"({'|'.join(HOSTS)})[.:][\w.:]*", text):
            module, _, name = text.partition(":")
            module = module.rstrip(".")
            if private(name) or (moving(module) and not module.rpartition(".")[2][:1].isupper()):
                self._add(line, text, "as a text")

    # Overrides

    def _overrides(self, node: ast.ClassDef) -> None:
        """Report methods and private attributes of another package that a class overrides and compat does not list."""
        functions = [(n.lineno, n.name) for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        assigned = [
            (n.lineno, target.id)
            for n in node.body
            if isinstance(n, ast.Assign | ast.AnnAssign)
            for target in (n.targets if isinstance(n, ast.Assign) else [n.target])
            if isinstance(target, ast.Name) and private(target.id)
        ]
        for base in node.bases:
            host = self._resolve(ast.unparse(base))
            for line, name in [*functions, *assigned]:
                owner = next((kind for kind in getattr(host, "__mro__", ()) if name in vars(kind)), None)
                root = owner.__module__.partition(".")[0] if owner else "trl_qtarget"
                if root == "trl_qtarget" or (name.startswith("__") and name.endswith("__")):
                    continue
                if (root in HOSTS or private(name)) and not listed(host, name):
                    self._add(line, name, f"overrides {root}'s {owner.__qualname__}.{name}")

    def _resolve(self, base: str) -> object:
        head, _, rest = base.partition(".")
        name = self.imported.get(base) or self.imported.get(head)
        if name is None:  # a class of this module or of Python
            return None
        return pkgutil.resolve_name(name if base in self.imported else f"{name}.{rest}")


def private(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.startswith("_") and last != "_" and not last.startswith("__")


def moving(module: str) -> bool:
    """Whether a module belongs to a host that does not document it."""
    first, *others = module.split(".")
    if first not in (*HOSTS, "torch"):
        return False
    if any(part.startswith("_") for part in others):
        return True
    return first != "torch" and bool(others) and module not in DOCUMENTED


@cache
def listed(host: type, name: str) -> bool:
    """Whether compat lists a name of this class or of one of its base classes."""
    entries = [entry.rpartition(".")[0] for entry in compat.PARAMETERS if entry.rpartition(".")[2] == name]
    return any(pkgutil.resolve_name(entry) in host.__mro__ for entry in entries if entry.partition(":")[2])


def defined(tree: ast.Module) -> set[str]:
    """Return the private names that a module defines: functions, classes, variables, attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return {name for name in names if private(name)}


@cache
def trees() -> dict[str, ast.Module]:
    """Parse every module of the package but those of compat."""
    files = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}
    return {name: ast.parse(file.read_text()) for name, file in files.items() if not name.startswith("compat/")}


@pytest.fixture(scope="module")
def own():
    return frozenset().union(*map(defined, trees().values()))


@pytest.mark.parametrize("file", trees())
def test_no_private_name_of_another_package(file, own):
    found = Scan(file, trees()[file], own).run().found
    lines = [f"trl_qtarget/{file}:{line}: {name} ({how})" for line, name, how in found]
    assert not lines, "give compat a function for it, and list the name there:\n" + "\n".join(lines)


def test_nothing_is_allowed_that_is_not_used(own, monkeypatch):
    allowed = list(ALLOWED)
    monkeypatch.setitem(globals(), "ALLOWED", [])
    used = {(file, name) for file, tree in trees().items() for _, name, _ in Scan(file, tree, own).run().found}
    for entry in allowed:
        assert {name for file, name in used if file.startswith(entry.files)} == entry.names, entry.reason


def test_compat_finds_only_what_it_lists():
    for file in (PACKAGE / "compat").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "find"
                and isinstance(node.args[0], ast.Constant)
            ):
                assert node.args[0].value in compat.PARAMETERS, f"{file}:{node.lineno}"


# The scan itself


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._C import _autograd", "_autograd"),
        ("from transformers.utils import _is_x", "_is_x"),
        ("from trl.trainer.sft_trainer import tokenize", "trl.trainer.sft_trainer"),
        ("from peft.tuners.tuners_utils import BaseTuner", "peft.tuners.tuners_utils"),
        ("def f():\n    from accelerate.commands import launch", "accelerate.commands"),
        ("name = model.config._name_or_path", "_name_or_path"),
        ("trainer._total_train_tokens += 1", "_total_train_tokens"),
        ("trainer._prepare_dataset(rows)", "_prepare_dataset"),
        ("names = getattr(model, '_no_split_modules', None)", "_no_split_modules"),
        ("setattr(trainer, '_metrics', {})", "_metrics"),
        ("shape = parameter.ds_shape", "ds_shape"),
        ("split = hasattr(parameter, 'ds_id')", "ds_id"),
        ("kinds = make_parser().dataclass_types", "dataclass_types"),
        ("files('trl.accelerate_configs')", "trl.accelerate_configs"),
        ("import_module(f'trl.scripts.{command}')", "trl.scripts."),
        ("find('transformers:Trainer._inner_training_loop')", "transformers:Trainer._inner_training_loop"),
        ("from trl import SFTTrainer\nclass T(SFTTrainer):\n    def training_step(self): ...", "training_step"),
        ("import trl\nclass T(trl.SFTTrainer):\n    _loss_names = []\n    async def predict(self): ...", "predict"),
        ("from trl import SFTConfig\nclass C(SFTConfig):\n    _VALID_DICT_FIELDS = []", "_VALID_DICT_FIELDS"),
        (
            "from ..training.trainer import TargetSFTTrainer as Own\nclass T(Own):\n    def training_step(self): ...",
            "training_step",
        ),
        ("class T:\n    def f(self):\n        return self._skip_prepare_dataset", "_skip_prepare_dataset"),
    ],
)  # fmt: skip
def test_a_private_name_is_found(tmp_path, text, name):
    (tmp_path / "text.py").write_text(f'"""A module."""\n\n{text}\n')
    tree = ast.parse((tmp_path / "text.py").read_text())
    found = Scan("data/text.py", tree, frozenset(defined(tree))).run().found
    assert name in {found_name for _, found_name, _ in found}
    assert min(line for line, _, _ in found) >= 3  # the text begins on the third line


@pytest.mark.parametrize(
    "text",
    [
        "from .columns import _join",
        "model._forward_before_qtarget = model.forward",
        "class A:\n    def __init__(self):\n        self._kept = 1\n\n\ndef f(a):\n    return a._kept",
        "from trl import SFTTrainer\nclass T(SFTTrainer):\n    def log(self, logs): super().log(logs, self._metrics)",
        "from trl import SFTTrainer\nclass T(SFTTrainer):\n    def __init__(self): ...\n    def _own(self): ...",
        "name.endswith('_token')",
        "entry._replace(done=True)",
        "'''How `trl.scripts.sft` does it.'''",
        "from transformers.utils import ModelOutput",
        "from torch.distributed.tensor import Partial",
        "pkgutil.resolve_name('transformers.AutoModelForCausalLM')",
    ],
)
def test_an_own_name_is_left_alone(text):
    tree = ast.parse(text)
    assert Scan("data/text.py", tree, frozenset(defined(tree))).run().found == []


def test_every_documented_module_is_there():
    for module in DOCUMENTED:
        importlib.import_module(module)
