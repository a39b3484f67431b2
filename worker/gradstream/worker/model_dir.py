"""The directory of the base model: as configured, or fetched from the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from gradstream.shared.config import ConfigError, Problem

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def model_directory(model_path: str) -> Path:
    """The directory that model_path is, or the hub's snapshot of that id, downloaded unless it is cached.

    Safe for several ranks at once. Raises ConfigError when it is neither.
    """
    path = Path(model_path)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(model_path, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"model_path: {model_path} is no directory here and could not be fetched from the hub ({reason})"
        raise ConfigError([Problem("", message)]) from error
