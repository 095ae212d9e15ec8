"""Whatever is typed, and whatever a YAML file holds: settings, or exit code 2 and a sentence; never a traceback.

2,000 derandomized cases for each reader. `pytest -m slow tests/test_fuzz.py` runs them, in some minutes.
"""

import os
import string
import warnings
from contextlib import contextmanager
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_qtarget.chain import chain_file, plan, validate
from trl_qtarget.scripts import eval as eval_script
from trl_qtarget.scripts import sft


pytestmark = pytest.mark.slow
CASES = settings(
    max_examples=2000, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
)


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    """Names of options: of `sft` with accelerate's, of `eval`, and of the commands of a chain."""
    made = {command: validate.options(command) for command in ("sft", "eval", "merge")}
    return {**made, "chain": [*chain_file.CHAIN_KEYS, *chain_file.STAGE_KEYS]}


# Values: what belongs there, what YAML makes of it, and anything else

TEXTS = st.one_of(
    st.sampled_from([
        "", " ", "true", "no", "null", "~", "1e-3", "-1", "0", "1.5", "nan", "inf", "1_000", "0x1f", "12:30",
        "2024-01-02",
        "dft", "target_sft", "nowhere.py:loss", "a/b", "./a", "{}", "[]", '{"eta": 0.5}', '{"a": [1, {}]}', "{bad",
        "${x}",
        "${stages.a.output_dir}", "steps", "auto", "\u00e9\u4e2d", "a\nb", "%s", "{0}", "--loss", "-", "--", "=", "@x",
    ]),
    st.text(st.sampled_from(string.printable), max_size=12),
    st.text(max_size=6),
)  # fmt: skip
NUMBERS = st.one_of(st.booleans(), st.integers(-(2**70), 2**70), st.integers(-3, 9), st.floats())
SCALARS = st.one_of(TEXTS, NUMBERS, st.none(), st.dates(), st.binary(max_size=3))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


def keys(known: list[str]) -> st.SearchStrategy[str]:
    """Names of options as they are, with dashes, with a letter more or less, and others."""
    name = st.sampled_from(known)
    changed = [name.map(lambda n: n.replace("_", "-")), name.map(lambda n: n[:-1]), name.map(lambda n: n + "s")]
    return st.one_of(*[name] * 5, *changed, TEXTS)


def documents(known: list[str]) -> st.SearchStrategy[str]:
    """YAML: settings as a mapping, other values, text, and mappings with a piece cut out or doubled."""
    mapping = st.dictionaries(keys(known), VALUES, max_size=5)
    # an environment belongs to the process, and the fuzz has one for all cases
    text = mapping.map(lambda made: {k: v for k, v in made.items() if k != "env"}).map(
        lambda made: yaml.safe_dump(made, allow_unicode=True)
    )
    cut = st.tuples(text, st.integers(0, 200), st.integers(0, 20)).map(lambda t: t[0][: t[1]] + t[0][t[1] + t[2] :])
    doubled = st.tuples(text, st.integers(0, 200)).map(lambda t: t[0] + t[0][t[1] :])
    return st.one_of(text, text, cut, doubled, VALUES.map(yaml.safe_dump), st.text(max_size=40))


def words(known: list[str]) -> st.SearchStrategy[list[str]]:
    """Command lines: options with and without values, and anything between them."""
    option = keys(known).map(lambda name: f"--{name}")
    piece = st.one_of(
        st.tuples(option, TEXTS).map(list),
        st.tuples(option, TEXTS).map(lambda pair: ["=".join(pair)]),
        option.map(lambda word: [word]),
        TEXTS.map(lambda word: [word]),
    )
    return st.lists(piece, max_size=5).map(lambda pieces: [word for piece in pieces for word in piece])


@contextmanager
def quiet():
    """No warnings, no output, and the environment as it was."""
    with (
        open(os.devnull, "w") as nothing,
        mock.patch("sys.stderr", nothing),
        mock.patch("sys.stdout", nothing),
        mock.patch.dict(os.environ),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def parses(make_parser, argv: list[str]) -> None:
    """The parser returns settings, shows its help, or exits with 2."""
    parser = make_parser()
    code = 0
    try:
        with quiet():
            parser.parse(argv)
    except SystemExit as ended:
        code = ended.code
    assert code in (0, 2)


def reads(make_parser, known: list[str], folder, data, complete: list[str]) -> None:
    text = data.draw(documents(known), label="YAML")
    file = folder / "recipe.yaml"
    try:
        file.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:  # a lone surrogate is no text
        return
    parses(make_parser, [*complete, "--config", str(file)])


COMPLETE = {  # without these no case would come beyond a missing option
    "sft": ["--use_cpu", "true", "--bf16", "false"],
    "eval": ["--model_name_or_path", "a", "--dataset", "b"],
}
MAKE = {"sft": sft.make_parser, "eval": eval_script.make_parser}


@pytest.mark.parametrize("command", MAKE)
@CASES
@given(data=st.data())
def test_a_yaml_file(command, names, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    reads(MAKE[command], names[command], folder, data, COMPLETE[command])


@pytest.mark.parametrize("command", MAKE)
@CASES
@given(data=st.data())
def test_a_command_line(command, names, data):
    argv = data.draw(words(names[command]), label="words")
    parses(MAKE[command], [*COMPLETE[command], *argv])


@CASES
@given(data=st.data())
def test_a_chain(names, tmp_path_factory, data):
    stage = st.dictionaries(keys([*chain_file.STAGE_KEYS, *names["sft"]]), VALUES, max_size=4)
    named = st.fixed_dictionaries(
        {"command": st.sampled_from(["sft", "eval", "merge", "sfft"])}, optional={"name": TEXTS}
    )
    stages = st.lists(st.tuples(named, stage).map(lambda pair: pair[1] | pair[0]) | stage | VALUES, max_size=3)
    top = st.fixed_dictionaries(
        {"output_dir": TEXTS | VALUES, "stages": stages | VALUES}, optional={"defaults": stage | VALUES}
    )
    whole = st.tuples(top, st.dictionaries(keys(names["chain"]), VALUES, max_size=1)).map(
        lambda pair: pair[0] | pair[1]
    )
    text = data.draw(
        whole.map(lambda made: yaml.safe_dump(made, allow_unicode=True)) | documents(names["chain"]), label="YAML"
    )
    file = tmp_path_factory.getbasetemp() / "chain.yaml"
    try:
        file.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:
        return
    found = ("a sentence",)
    try:
        with quiet():
            chain = chain_file.read(str(file))
            plan.resolve(chain, dict.fromkeys(chain_file.OUTPUT, names["sft"]))
    except chain_file.Mistakes as mistakes:
        found = mistakes.args
    assert found
