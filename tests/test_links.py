"""Every link of the documentation to a file leads somewhere."""

import re

import pytest

from tests.guides import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
LINKS = [
    pytest.param(page, link, id=f"{page.relative_to(ROOT)}: {link}")
    for page in PAGES
    for link in re.findall(r"\]\(([^)#:]+)[)#]", page.read_text())
]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_lead_somewhere(page, link):
    assert (page.parent / link).exists()
