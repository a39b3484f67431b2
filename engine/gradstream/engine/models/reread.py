"""The base model's weights as its files have them, once more, after training changed them."""

from gradstream.engine.files import storage_errors
from gradstream.engine.models.build import Build, load_causal_lm
from gradstream.engine.models.digest import model_digest
from gradstream.engine.parallel.agree import on_leader
from gradstream.engine.state import EngineState
from gradstream.shared.errors import StorageFailure


def reread(state: EngineState) -> None:
    """Put the files' weights into the flat parameters, wherever these are; collective.

    Rank 0 reads, the others get what it read. Raises Unsupported or StorageFailure, with the weights as they were, when the files
    cannot be read or are not those that the engine was started with.
    """
    flat, path = state.flat, state.config.model_path
    build = Build.of(state.config)

    def work() -> bytes:
        with storage_errors(f"model_path: {path} cannot be read"):
            digest = model_digest(path, config_dir=build.config_path)
        if digest != state.base.facts.digest:
            raise StorageFailure(
                f"model_path: {path} holds other weights than when this server was started; restart it"
            )
        read = load_causal_lm(path, dtype=flat.weights.dtype, build=build).named_parameters()
        flat.fill({name: parameter.detach() for name, parameter in read})
        return b""

    on_leader(state.comm, work)
    state.comm.broadcast_(flat.weights)
    flat.is_fresh = True
