"""The README and the site: every Python snippet runs as it stands and gives what its comments say; the site builds."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import torchvision
from sybil import Example, Sybil
from sybil.evaluators.python import pad
from sybil.parsers.markdown import CodeBlockParser

from docs.docstrings import to_markdown

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = ROOT / "docs" / "integrations.md"  # by make test-integrations


def evaluate(example: Example) -> None:
    """Runs a snippet a statement at a time, and holds the values of expressions and shapes against the comments."""
    source = pad(example.parsed, example.line + example.parsed.line_offset)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string[2:] for token in tokens if token.type == tokenize.COMMENT}

    def check(node: ast.stmt, got: str) -> None:
        said = comments[node.end_lineno]
        assert said == got, f"{example.path}:{node.lineno} says {said}; got {got}"

    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), example.path, "eval"), example.namespace)
            if value is not None and statement.end_lineno in comments:
                check(statement, repr(value))
            continue
        exec(compile(ast.Module([statement], []), example.path, "exec"), example.namespace)
        for node in ast.walk(statement):  # which may be a with statement
            if isinstance(node, ast.Assign) and comments.get(node.end_lineno, "").startswith("torch.Size"):
                check(node, repr(example.namespace[node.targets[0].id].shape))


SNIPPETS = Sybil([CodeBlockParser("python", evaluate)])


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to write into, and random weights instead of a download."""

    def random_weights(weights: torchvision.models.WeightsEnum, *args: object, **kwargs: object) -> dict:
        name = type(weights).__name__.removesuffix("_Weights").lower()
        return torchvision.models.get_model(name).state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", random_weights)
    monkeypatch.chdir(tmp_path)
    yield
    for path in tmp_path.iterdir():  # checkpoints among them, which pytest would keep
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("page", [page for page in PAGES if page != RUN_ELSEWHERE], ids=lambda page: page.name)
@pytest.mark.usefixtures("elsewhere")
def test_snippets_run_and_give_what_they_say(page: Path) -> None:
    for example in SNIPPETS.parse(page).examples():
        example.evaluate()


@pytest.mark.parametrize(
    ("snippet", "complaint"),
    [
        ("import torch\ny = torch.zeros(2)  # torch.Size([3])", r"page.md:3 says torch.Size\(\[3\]\); got"),
        ("1 + 1  # 3", "page.md:2 says 3; got 2"),
    ],
)
def test_a_comment_that_is_wrong_is_found(snippet: str, complaint: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\n{snippet}\n```\n")
    (example,) = SNIPPETS.parse(page).examples()
    with pytest.raises(AssertionError, match=complaint):
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_addresses_have_the_form_of_one(page: Path) -> None:
    for address in re.findall(r"\]\((\w+:[^)]*)\)", page.read_text(encoding="utf-8")):
        assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./-]*)?", address), address


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_in_place_of_a_table_leads_to_its_heading(page: Path) -> None:
    for heading, path, anchor in re.findall(r"^\[Table: (.+)\]\(([^#)]+)(\S*)\)$", page.read_text(), re.MULTILINE):
        text = (page.parent / path).read_text(encoding="utf-8")
        whole = re.search(rf"^#+ ({re.escape(heading)}.*)", text, re.MULTILINE)[1]
        assert anchor == "#" + re.sub(r"[^\w -]", "", whole.lower()).replace(" ", "-")  # as GitHub names it


def test_docstrings_become_markdown() -> None:
    docstring = [
        "See :func:`f`, :meth:`g`::",
        "",
        "    a * b",
        "",
        "(B, *spatial), ``*kept``.",
        "",
        "Returns:",
        "    It.",
        "",
        "Example:",
        "    >>> 2 * 3",
    ]
    assert to_markdown("\n".join(docstring), "ema_attention.T.").splitlines() == [
        "See [`f`][ema_attention.f], [`g`][ema_attention.T.g]:",
        "",
        "```text",
        "",
        "a * b",
        "```",
        "",
        r"(B, \*spatial), ``*kept``.",
        "",
        "**Returns:**",
        "",
        "It.",
        "",
        "Examples:",
        "    >>> 2 * 3",
    ]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """With mkdocs.yml's validation, which makes a link or an anchor that leads nowhere a warning."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    build = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    assert "WARNING" not in build.stderr
    # Notebooks are pages with their pictures, and cells of numbers, which stay on one line, are marked.
    tutorial = (tmp_path / "notebooks" / "tutorial.ipynb.html").read_text(encoding="utf-8")
    assert '<img alt="What the cell above shows" src="data:image/' in tutorial
    assert re.search(r'class="numbers">[\d.]+ \[', (tmp_path / "benchmarks.html").read_text(encoding="utf-8"))
    # Neither roles, double colons nor links where tables belong are left, and nothing is loaded from anywhere.
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    assert not re.search(r":(func|class|meth):|::\s*<|``", reference)
    for page in tmp_path.rglob("*.html"):
        loads = r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=.?https?:"
        assert not re.search(rf"{loads}|>Table: ", page.read_text(encoding="utf-8")), page
