"""The snippets of docs/chat.md run, in order, in one namespace."""

import re
from pathlib import Path

from rorqual.chat import dialect, machine

DOCS = Path(__file__).parents[2] / "docs" / "chat.md"


def test_every_snippet_runs():
    snippets = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert len(snippets) == 7
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(DOCS), "exec"), namespace)


def test_every_diagnostic_is_in_the_table_and_no_other():
    room = Path(machine.__file__).parent
    code = "".join((room / name).read_text("utf-8") for name in ("machine.py", "calls.py", "parser.py"))
    reports = r'(?:diagnose\(|"diagnostic",|_skip_to_tag\(|_eos\(at,|\),)\s*"([a-z]+_?[a-z_]*)"'
    kinds = set(re.findall(reports, code))
    table = DOCS.read_text("utf-8").split("### Recovery")[1].split("Choices are in")[0]
    documented = set(re.findall(r"\| `(\w+)` \|$", table, re.MULTILINE))
    assert documented == kinds


def test_the_numbers_in_the_docs_are_those_of_the_code():
    text = DOCS.read_text("utf-8")
    assert f"{dialect.MAX_SPACE} of white space" in text and f"{dialect.MAX_HEADER} of a header" in text
    longest = max(map(len, dialect.V4.value_stops)) - 1 + len("｜DSML｜")  # a mark is one character
    assert f"at most {longest - 1} characters" in text
