"""docs/endpoints.md is what the routes say, and every call has a sentence."""

import importlib.util
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent


def test_the_page_of_endpoints_is_up_to_date():
    spec = importlib.util.spec_from_file_location("endpoints", REPOSITORY / "tools" / "endpoints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = (REPOSITORY / "docs" / "endpoints.md").read_text(encoding="utf-8")
    assert shown == module.page(), "run: python tools/endpoints.py > docs/endpoints.md"
    assert all(not row.endswith("|  |") for row in module.rows())
