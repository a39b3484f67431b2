"""docs/losses.md says what the cards say."""

from tools.losses_docs import PAGE, as_markdown


def test_the_page_of_losses_is_what_the_losses_themselves_say():
    assert PAGE.read_text(encoding="utf-8") == as_markdown(), "run python -m tools.losses_docs"
