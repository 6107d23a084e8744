"""Links of pages as GitHub shows them become links of the site."""

import pytest

from tools.site_links import rewrite_links

PAGES = {"callbacks/README.md": "callbacks.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        ("how_to/extend.md", "[a](../install.md#x)", "[a](../install.md#x)"),  # within docs/
        ("how_to/extend.md", "[a](../../CONTRIBUTING.md#where)", "[a](../CONTRIBUTING.md#where)"),  # became a page
        ("reference/api/callbacks.md", "[a](../../../callbacks/README.md)", "[a](../../callbacks.md)"),
        ("callbacks.md", "[a](../docs/methods/Ties.md)", "[a](methods/Ties.md)"),  # from a page that was outside
        ("README.md", "[a](../configs)", "[a](https://host/main/configs)"),  # not in the site
        ("CONTRIBUTING.md", "[a](docs/README.md)", "[a](README.md)"),
        ("README.md", "[a](https://host/b.md), [b](#c)", "[a](https://host/b.md), [b](#c)"),
        ("README.md", "![a](../b.png)", "![a](../b.png)"),
        ("README.md", "```\n[a](../b.md)\n```", "```\n[a](../b.md)\n```"),
    ],
)
def test_a_link_leads_to_the_same_file(page: str, before: str, after: str) -> None:
    assert rewrite_links(before, page, PAGES, "https://host/main") == after


def test_without_a_repository_the_text_of_a_link_stays() -> None:
    assert rewrite_links("see [configs/](../configs), all of it", "README.md", PAGES, "") == "see configs/, all of it"
