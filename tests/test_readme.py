"""The pages agree with the package: the table of losses, links, paths, modules, options, and code that runs."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import trl_qtarget
from trl_qtarget import PRESETS, build, compat
from trl_qtarget.chain.validate import options
from trl_qtarget.scripts.sft import make_parser


ROOT = Path(__file__).parents[1]
README, GUIDE = ROOT / "README.md", ROOT / "recipes" / "guide"
PAGES = sorted(
    page
    for pattern in ("*.md", ".github/**/*.md", "recipes/**/*.md", "benchmarks/**/*.md", "trl_qtarget/**/*.md")
    for page in ROOT.glob(pattern)
)
BLOCK = re.compile(r"(<!-- losses:[^\n]*-->\n).*(<!-- /losses -->)", re.DOTALL)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"(?:(?:trl_qtarget|recipes|benchmarks|tests)/[\w./-]*\w\.\w+|(?:trl_qtarget|tests)/[\w/]+/)")
COMMANDS = ("sft", "cache", "plan", "eval", "merge")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def table() -> str:
    rows = ["| `--loss` | formula | needs | paper |", "|---|---|---|---|"]
    for name, preset in PRESETS.items():
        formula = re.sub(r"\s{4}\(.*", "", preset.formula)
        formula = re.sub(r"\s{2,}", ", ", formula).replace("|", "\\|")
        paper = "" if preset.paper == "-" else f"[{preset.paper}](https://huggingface.co/papers/{preset.paper})"
        rows.append(f"| `{name}` | {formula} | {', '.join(preset.needs).replace('_', ' ')} | {paper} |")
    return "\n".join(rows) + "\n"


def fenced(page: Path, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language in languages]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[tuple[str, set[str]]]:
    """Each `trl-qtarget` command of a page's shell blocks, with the options that it is given."""
    for code in fenced(page, "bash", "yaml", "diff"):
        for line in code.replace("\\\n", " ").splitlines():
            for command, words in re.findall(r"trl-qtarget (\w+)([^;|&#`]*)", line):
                yield command, set(re.findall(r"(?<![\w-])--([a-z]\w*)", words))


def test_the_table_of_losses_is_that_of_the_presets():
    block = BLOCK.search(README.read_text())
    assert block is not None
    assert block[0] == block[1] + table() + block[2], "run `make readme`"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{name(page)} links to {link}"
        assert not anchor or anchor in anchors(file), f"{name(page)} links to {link}: no heading has that anchor"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_modules_that_a_page_names_exist(page):
    text = page.read_text()
    missing = [file for file in FILE.findall(text) if not (ROOT / file).exists() and "*" not in file]
    assert not missing, f"{name(page)} names {missing}"
    for module in re.findall(r"python -m ((?:trl_qtarget|benchmarks)[\w.]*\w)", text):
        assert importlib.util.find_spec(module), f"{name(page)} names the module {module}"


def test_options_on_the_pages_are_options_of_their_commands():
    known = {command: {*options(command), "config", "print_config"} for command in COMMANDS}
    known |= {"chain": {"config", "dry_run", "from", "to"}, "losses": set(), "completion": set()}
    for page in PAGES:
        for command, given in commands(page):
            assert command in known, f"{name(page)} has trl-qtarget {command}"
            assert given <= known[command], f"{name(page)}: trl-qtarget {command} has no {given - known[command]}"


@pytest.mark.parametrize("page", [README, *sorted(GUIDE.glob("*.md"))], ids=name)
def test_code_compiles_and_yaml_parses(page):
    for code in fenced(page, "python"):
        compile(code, name(page), "exec")
    for code in fenced(page, "yaml"):
        yaml.safe_load(code)


def test_the_recipe_of_the_readme_is_understood(tmp_path):
    (recipe,) = fenced(README, "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    parsed = make_parser().parse(["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "--bf16", "false"])
    assert parsed.values[1].target().needs == ("teacher",)


def test_the_loss_of_the_guide_can_be_used(tmp_path, monkeypatch):
    source, implied = fenced(GUIDE / "your-own-loss.md", "python")
    (tmp_path / "my_losses.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    try:
        target = build("my_losses.py:cautious", floor=0.2)
        assert target.needs == ("teacher",)
    finally:
        PRESETS.pop("cautious", None)
    made = {}
    exec(compile(implied, "your-own-loss.md", "exec"), made)
    assert made["Q"].sum(-1).allclose(made["Q"].new_ones(4))


def test_the_map_names_every_room():
    shown = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    package = Path(trl_qtarget.__file__).parent
    rooms = [f"`{path.name}/`" for path in package.iterdir() if (path / "__init__.py").exists()]
    modules = [f"`{path.name}`" for path in package.glob("*.py") if not path.name.startswith("__")]
    assert [room for room in (*rooms, *modules) if room not in shown] == []


def test_the_tested_versions_are_those_of_the_package():
    shown = (GUIDE / "limits.md").read_text()
    names = {"trl": "TRL", "transformers": "transformers", "peft": "PEFT"}
    for package, (first, last) in compat.TESTED.items():
        assert f"{names[package]} {first} and {last}" in shown


if __name__ == "__main__":
    README.write_text(BLOCK.sub(lambda block: block[1] + table() + block[2], README.read_text()))
