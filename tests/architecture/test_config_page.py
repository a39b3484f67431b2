"""docs/config.md is complete, is what the code says, and names a test for every field that has a choice."""

import pytest
import yaml

from gradstream.shared.config.fields import FIELDS
from tools.config_docs import PAGE, REPOSITORY, fields_of, fields_with_tests, open_fields, page

SEED = yaml.safe_load((REPOSITORY / "tests/unit/shared/seed_fields.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SEED)
def test_the_page_has_a_row_for_every_field_of_the_reference(name):
    assert f"\n| `{name}` | " in PAGE.read_text(encoding="utf-8")


def test_the_page_is_what_the_settings_and_the_tests_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tools.config_docs"


def test_every_field_that_has_more_than_one_value_has_a_test():
    assert sorted(open_fields() - fields_with_tests().keys()) == [], (
        "put @pytest.mark.config_field(NAME) on a test that fails when the field does nothing"
    )


def test_markers_name_fields_that_exist():
    assert {name: paths for name, paths in fields_with_tests().items() if name not in FIELDS} == {}


def test_a_marker_is_found_wherever_pytest_takes_one():
    source = """
import pytest
pytestmark = [pytest.mark.config_field("seed")]
@pytest.mark.config_field("device", "output_dir")
class TestIt:
    @pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.config_field("lora_rank"))])
    def test_it(self, x): ...
"""
    assert sorted(fields_of(source)) == ["device", "lora_rank", "output_dir", "seed"]


def test_a_marker_whose_name_is_computed_is_refused():
    with pytest.raises(TypeError, match="takes field names as they are"):
        list(fields_of("import pytest\n@pytest.mark.config_field(*NAMES)\ndef test(): ...\n"))
