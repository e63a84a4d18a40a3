"""docs/integrations.md, section by section."""

from sybil import Example

from tests.docs.test_documentation import RUN_ELSEWHERE as PAGE
from tests.docs.test_documentation import SNIPPETS

EXPORT = "Deployment"
SECTIONS = [line.removeprefix("## ") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("## ")]


def run(section: str) -> None:
    """Runs the snippets of a section, each after those before it."""
    document = SNIPPETS.parse(PAGE)
    headings = [i for i, line in enumerate(document.text.splitlines(), 1) if line.startswith("## ")]
    start = headings[SECTIONS.index(section)]
    end = min((line for line in headings if line > start), default=len(document.text))
    examples: list[Example] = [example for example in document.examples() if start < example.line < end]
    document.namespace["__name__"] = "__main__"  # of the classes that a snippet defines
    for example in examples:
        example.evaluate()
