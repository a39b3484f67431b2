"""compose.yaml and the Dockerfile, as far as they can be checked without a container engine."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent.parent
COMPOSE_FILES = ("compose.yaml", "compose.gpu.yaml")


def compose(name: str = "compose.yaml") -> dict:
    return yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8"))


def words(service: dict) -> list[str]:
    return [word for part in service.get("command", []) for word in part.split()]


def build_stages() -> dict[str, str]:
    """Stage name to what it is built from."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    return {name: source for source, name in re.findall(r"^FROM (\S+) AS (\S+)$", text, flags=re.MULTILINE)}


def test_compose_has_the_four_services_of_the_server():
    assert {"redis", "api", "worker", "housekeeping", "exports"} <= set(compose()["services"])


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_every_build_target_is_a_stage_of_the_dockerfile(name):
    targets = {service["build"]["target"] for service in compose(name)["services"].values() if "build" in service}

    assert targets <= set(build_stages())


def test_the_gpu_file_changes_only_services_that_exist():
    assert set(compose("compose.gpu.yaml")["services"]) <= set(compose()["services"])


def test_every_module_that_a_service_runs_exists():
    for name, service in compose()["services"].items():
        line = words(service)
        modules = [line[index + 1] for index, word in enumerate(line[:-1]) if word == "-m"]
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        assert missing == [], name


def test_every_file_that_is_copied_or_configured_exists():
    copied = re.findall(
        r"^COPY (?!--)(.+)$", (REPOSITORY / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    sources = [source for line in copied for source in line.split()[:-1]]
    line = words(compose()["services"]["settings"])
    sources.append(line[line.index("--config") + 1])

    assert [source for source in sources if not (REPOSITORY / source).exists()] == []


def test_every_volume_and_dependency_is_declared():
    whole = compose()
    for service in whole["services"].values():
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(whole["volumes"])
        assert set(service.get("depends_on", {})) <= set(whole["services"])


def test_every_process_that_reads_or_writes_saves_sees_the_same_output_dir():
    config = yaml.safe_load((REPOSITORY / "configs" / "compose.yaml").read_text(encoding="utf-8"))
    for name in ("api", "worker", "housekeeping", "exports"):
        places = [volume.split(":")[:2] for volume in compose()["services"][name]["volumes"]]
        assert ["outputs", config["output_dir"]] in places, name


def test_the_queue_never_evicts_and_is_on_disk_before_it_answers():
    command = compose()["services"]["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))

    assert options["--maxmemory-policy"] == "noeviction"
    assert (options["--appendonly"], options["--appendfsync"]) == ("yes", "always")


@pytest.mark.slow
def test_the_requirements_of_the_api_image_suffice_to_import_the_api(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", "constraints.txt", "-r", "api/requirements.txt"], cwd=REPOSITORY, check=True)
    program = "import gradstream.api.__main__, importlib.util; print(importlib.util.find_spec('torch'))"

    found = subprocess.run(
        [str(python), "-c", program],
        env={"PYTHONPATH": f"{REPOSITORY / 'api'}:{REPOSITORY / 'shared'}"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert found.stdout.strip() == "None"
