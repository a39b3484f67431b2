"""Writes wire_pb2.py and wire_pb2.pyi from wire.proto; `--check` only compares them with what is committed."""

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "api"
# The path below the source root becomes the file's name in protobuf's global pool, so that it meets no other wire.proto.
PACKAGE = Path("gradstream/api/tinker/proto")
OUTPUTS = ("wire_pb2.py", "wire_pb2.pyi")


def generate(target: Path) -> None:
    """Put both files below target, in the package's folder."""
    code = protoc.main(
        [
            "protoc",
            f"-I{SOURCES}",
            f"--python_out={target}",
            f"--plugin=protoc-gen-mypy={Path(sys.executable).parent / 'protoc-gen-mypy'}",
            f"--mypy_out=quiet:{target}",
            str(SOURCES / PACKAGE / "wire.proto"),
        ]
    )
    if code:
        raise SystemExit(f"protoc ended with {code}")


def stale() -> list[str]:
    """Names of committed files that differ from what the .proto gives."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        made = Path(folder) / PACKAGE
        return [name for name in OUTPUTS if (SOURCES / PACKAGE / name).read_bytes() != (made / name).read_bytes()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the committed files are stale")
    if parser.parse_args().check:
        names = stale()
        raise SystemExit(f"stale: {', '.join(names)}; run python tools/generate_proto.py" if names else 0)
    generate(SOURCES)


if __name__ == "__main__":
    main()
