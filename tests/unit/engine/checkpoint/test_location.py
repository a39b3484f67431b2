from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.engine.checkpoint.location import CheckpointKind, checkpoint, ephemeral, parse_uri
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.ids import ModelId, SamplerId

ROOT = Path("/srv/output")


@pytest.mark.parametrize(
    "uri",
    [
        "tinker://s:train:0/weights/step-10",
        "tinker://s:train:0/sampler_weights/final.1",
        "tinker://samplers/s:sample:3",
        "tinker://samplers/weights/x",
    ],
)
def test_a_uri_read_and_written_is_the_same_uri(uri):
    assert parse_uri(uri).uri() == uri


def test_directories_are_readable_and_apart():
    model, sampler = ModelId("s:train:0"), SamplerId("s:sample:0")
    assert checkpoint(model, CheckpointKind.WEIGHTS, "a").directory(ROOT) == ROOT / "checkpoints/s+train+0/weights/a"
    assert ephemeral(sampler).directory(ROOT) == ROOT / "samplers/s+sample+0"


ESCAPES = [
    "..",
    ".",
    "../x",
    "a/../../x",
    "/etc",
    "a/b",
    "",
    "a\0b",
    "a\nb",
    "~",
    "a..b",
    "-x",
    " a",
    "a" * 300,
    "a%2e%2e",
]


@pytest.mark.parametrize("name", ESCAPES, ids=repr)
def test_a_name_that_is_no_single_path_part_is_refused(name):
    with pytest.raises(InvalidRequest):
        checkpoint(ModelId("s:train:0"), CheckpointKind.WEIGHTS, name)
    with pytest.raises(InvalidRequest):
        checkpoint(ModelId(name), CheckpointKind.WEIGHTS, "fine")
    with pytest.raises(InvalidRequest):
        ephemeral(SamplerId(name))


@given(
    st.one_of(
        st.text(),
        st.builds("tinker://{}/weights/{}".format, st.text(), st.text()),
        st.builds("tinker://samplers/{}".format, st.text()),
    )
)
def test_no_uri_leads_out_of_the_output_directory(uri):
    try:
        directory = parse_uri(uri).directory(ROOT)
    except InvalidRequest:
        return
    assert ROOT in Path(str(directory.absolute())).parents
    assert ".." not in directory.parts


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "weights/x",
        "file:///etc/passwd",
        "tinker://m",
        "tinker://m/weights",
        "tinker://m/other/x",
        "tinker://m/weights/x/y",
    ],
)
def test_what_is_no_checkpoint_uri_is_refused_with_the_right_form(uri):
    with pytest.raises(InvalidRequest, match=r"tinker://MODEL/KIND/NAME|is not a"):
        parse_uri(uri)
