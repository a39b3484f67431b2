"""What lies in the output directory, as the worker's records describe it: manifests to read, directories to remove."""

import shutil
from pathlib import Path

from gradstream.engine.checkpoint.location import Location, parse_uri
from gradstream.engine.checkpoint.manifest import Manifest, read_manifest


class Storage:
    """Checkpoints and samplers below one output directory, by their URIs."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir

    def manifest(self, uri: str) -> Manifest:
        """The manifest of a save; raises UnknownModel or StorageFailure as `read_manifest` does."""
        return read_manifest(parse_uri(uri).directory(self._output_dir), source=uri)

    def remove(self, location: Location) -> bool:
        """Delete a save; True when there was one. Renamed first, so that a reader finds all of it or nothing."""
        directory = location.directory(self._output_dir)
        doomed = directory.with_name(f".removed-{directory.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        try:
            directory.rename(doomed)
        except FileNotFoundError:
            return False
        shutil.rmtree(doomed)
        return True
