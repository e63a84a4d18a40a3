"""EMAUnit in other people's frameworks: the page Integrations, and what it says of each."""

import pytest

from tests.integrations.page import EXPORT, SECTIONS, run


@pytest.mark.parametrize("section", [section for section in SECTIONS if section != EXPORT])
def test_the_page_runs_as_it_stands(section: str) -> None:
    run(section)
