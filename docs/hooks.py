"""What the site shows of the repository around docs/: the files that pages link to, tables of theirs, the explorer.

A link ``../path`` on a page here leads to a file of the repository, as it does where the page is read there. The site
gets that file too, and what it links to: Markdown as a page, Python as a page that shows it, all else as it is. A
notebook in docs/ gets a page with its cells and their outputs, next to the file itself.

A line ``[Table: heading](path#anchor)`` becomes the first table below the heading that starts so in that file. The
anchor is for those who read the page in the repository.
"""

from __future__ import annotations

import json
import posixpath
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
EXPLORER = "explorer_of_the_cat.html"
LINK = re.compile(r"(?<=\]\()[^)#:\s]+(?=[)#])")
TABLE = re.compile(r"^\[Table: (?P<heading>.+)\]\((?P<path>[^)#\s]+)(#\S+)?\)$", re.MULTILINE)
NUMBERS = re.compile(r'(?<=<td style="text-align: right;")(?=>(?![^<]*[^\W\d_]{5})[^<]*</td>)')
"""Where a cell gets its class: right-aligned, and without a word of five letters."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the explorer, and every file of the repository that a page leads to."""
    files.append(File.generated(config, EXPLORER, content=explorer()))
    paths = [f"docs/{file.src_uri}" for file in files.documentation_pages()] + list(PAGES)
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.append(File.generated(config, f"{file.src_uri}.md", content=notebook_page(file.src_uri)))
    for path in paths:  # which grows
        if not path.startswith("docs/"):
            files.append(File.generated(config, address(path), content=content(path)))
        if path.endswith(".md"):
            for text, source in parts((ROOT / path).read_text(encoding="utf-8"), path):
                targets = dict.fromkeys(follow(link, source) for link in LINK.findall(text))
                paths += [target for target in targets if target not in paths and is_ours(target)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository to links between pages of the site, and fills in tables."""
    uri = page.file.src_uri
    if uri.endswith((".py.md", ".ipynb.md")):
        return markdown

    def relink(text: str, source: str) -> str:
        def new(link: re.Match[str]) -> str:
            path = follow(link[0], source)
            if not (ROOT / path).is_file():
                return link[0]
            return posixpath.relpath(address(path), posixpath.dirname(uri) or ".")

        return LINK.sub(new, text)

    source = uri if page.file.generated_by else f"docs/{uri}"
    return "".join(relink(*part) for part in parts(markdown, source))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Marks the table cells that hold numbers, which site.css keeps on one line."""
    return NUMBERS.sub(' class="numbers"', html)


@cache
def explorer() -> str:
    """The page of the demo's cat, as its command makes it."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / EXPLORER
        subprocess.run([sys.executable, "-m", "examples.explorer", "--output", str(page)], cwd=ROOT, check=True)
        return page.read_text(encoding="utf-8")


def parts(markdown: str, source: str) -> Iterator[tuple[str, str]]:
    """The pieces of a page and the tables that it asks for, each with the file that its links start from."""
    end = 0
    for ask in TABLE.finditer(markdown):
        yield markdown[end : ask.start()], source
        path = follow(ask["path"], source)
        yield find_table(path, ask["heading"]), path
        end = ask.end()
    yield markdown[end:], source


def find_table(path: str, heading: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}(?s:.*?)\n((?:\|.*\n)+)", text, re.MULTILINE)
    if found is None:
        raise PluginError(f"{path} must have a table below a heading that starts with {heading!r}; got none")
    return found[1]


def content(path: str) -> str | bytes:
    if not path.endswith(".py"):
        return (ROOT / path).read_bytes()
    code = (ROOT / path).read_text(encoding="utf-8")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n~~~~python\n{code}~~~~\n"


def notebook_page(uri: str) -> str:
    """The cells of a notebook as Markdown, with the text and the pictures that they gave when it was saved."""
    cells = json.loads((ROOT / "docs" / uri).read_text(encoding="utf-8"))["cells"]
    pieces: list[str] = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            pieces.append(source.replace(".ipynb)", ".ipynb.md)"))
            continue
        given = [output.get("data", {"text/plain": output.get("text", "")}) for output in cell["outputs"]]
        pictures = [next((kind for kind in data if kind.startswith("image/")), None) for data in given]
        text = "".join(
            "".join(data["text/plain"]) for data, picture in zip(given, pictures, strict=True) if not picture
        )
        pieces.append(f"~~~~python\n{source}\n~~~~")
        pieces += [f"~~~~text\n{text.strip()}\n~~~~"] if text.strip() else []
        pieces += [
            f'<img alt="What the cell above shows" src="data:{picture};base64,{"".join(data[picture]).strip()}">'
            for data, picture in zip(given, pictures, strict=True)
            if picture
        ]
    title, _, rest = "\n\n".join(pieces).partition("\n")
    return f"{title}\n\n*[This page as a notebook]({posixpath.basename(uri)}).*\n{rest}"


def follow(link: str, source: str) -> str:
    """The path in the repository that a link in the file ``source`` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def is_ours(path: str) -> bool:
    return not path.startswith(("docs/", "..")) and (ROOT / path).is_file()


def address(path: str) -> str:
    """Where the site has a file of the repository."""
    return path.removeprefix("docs/") + (".md" if path.endswith((".py", ".ipynb")) else "")
