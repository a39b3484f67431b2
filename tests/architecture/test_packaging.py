"""The distribution: a namespace package of four portions, typed, built whole from its sdist."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.lock import EXTRAS, ROOT, closure

REPOSITORY = Path(__file__).parent.parent.parent
PORTIONS = ("api", "engine", "shared", "worker")


def source_files() -> set[str]:
    """Files of the four portions as git sees them (ignored ones left out), relative to their source root."""
    listed = subprocess.run(
        [
            "git",
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            *[f"{portion}/gradstream" for portion in PORTIONS],
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("the repository is not a git checkout")
    return {name.split("/", 1)[1] for name in listed.stdout.splitlines() if (REPOSITORY / name).exists()}


@pytest.mark.parametrize("portion", PORTIONS)
def test_no_init_file_hides_the_other_portions(portion):
    assert not (REPOSITORY / portion / "gradstream" / "__init__.py").exists()


@pytest.mark.parametrize("portion", PORTIONS)
def test_every_portion_says_that_it_is_typed(portion):
    assert (REPOSITORY / portion / "gradstream" / portion / "py.typed").exists()


@pytest.mark.slow
def test_the_wheel_built_from_the_sdist_holds_exactly_the_source_files(tmp_path):
    expected = source_files()

    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)],
        check=True,
        capture_output=True,
    )

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        content = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert content == expected


def test_importing_the_api_does_not_import_torch():
    program = "import sys, gradstream.api.app; print([name for name in ('torch', 'transformers', 'gradstream.engine') if name in sys.modules])"

    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert loaded.stdout.strip() == "[]"


def test_every_package_that_gradstream_needs_is_pinned_at_the_installed_version():
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))

    needed = closure(ROOT, EXTRAS)

    differing = {name: (version, pins.get(name)) for name, version in needed.items() if pins.get(name) != version}
    assert not differing, "installed and pinned differ; `make setup` installs the pins, `make lock` writes new ones"
