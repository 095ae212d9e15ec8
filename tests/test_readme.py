"""The README says what is: its table of losses is made from PRESETS (`make readme`), its own loss runs."""

import re
from pathlib import Path

from trl_qtarget import PRESETS, build


README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- losses:[^\n]*-->\n).*(<!-- /losses -->)", re.DOTALL)


def table() -> str:
    rows = ["| `--loss` | formula | needs | paper |", "|---|---|---|---|"]
    for name, preset in PRESETS.items():
        formula = re.sub(r"\s{4}\(.*", "", preset.formula)
        formula = re.sub(r"\s{2,}", ", ", formula).replace("|", "\\|")
        paper = "" if preset.paper == "-" else f"[{preset.paper}](https://huggingface.co/papers/{preset.paper})"
        rows.append(f"| `{name}` | {formula} | {', '.join(preset.needs).replace('_', ' ')} | {paper} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_losses_is_that_of_the_presets():
    block = BLOCK.search(README.read_text())
    assert block is not None
    assert block[0] == block[1] + table() + block[2], "run `make readme`"


def test_the_loss_of_the_readme_can_be_used(tmp_path, monkeypatch):
    source = next(
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "@preset" in code
    )
    (tmp_path / "my_losses.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    try:
        target = build("my_losses.py:cautious", floor=0.2)
        assert target.needs == ("teacher",)
    finally:
        PRESETS.pop("cautious", None)


if __name__ == "__main__":
    README.write_text(BLOCK.sub(lambda block: block[1] + table() + block[2], README.read_text()))
