"""Two processes that train one model at the same time, and one process that does the same work alone; JSON on stdout.

Run inside a client's environment: python together.py URL BASE_MODEL [ORDER]
Without ORDER a process makes a model, starts a second one, and both train it; with ORDER, a JSON list of what they did, in the order
in which the server did it, one process does that.
"""

import inspect
import json
import multiprocessing
import sys
from multiprocessing.synchronize import Barrier

import tinker
from calls import datum, ready
from tinker import types

API_KEY = "tml-contract"
LANE_HEADER = "X-Gradstream-Lane"
RANK, SEED = 4, 11
# How many forward_backward calls each process makes before each step; the first process is lane 0, the second lane 7.
OTHER_LANE = 7
CALLS = {0: (2, 5, 1), OTHER_LANE: (4, 0, 3)}
# Who steps: the steps are the model's, whoever asks for them.
STEPPER = (0, OTHER_LANE, 0)
WAIT_S = 200.0


def service_in(url: str, lane: int) -> tinker.ServiceClient:
    """A client whose every request names the lane; in lane 0 none does."""
    headers = {LANE_HEADER: str(lane)} if lane else {}
    known = inspect.signature(tinker.ServiceClient).parameters
    name = "default_headers_overrides" if "default_headers_overrides" in known else "default_headers"
    return tinker.ServiceClient(base_url=url, api_key=API_KEY, **{name: headers})


def fresh(url: str, base_model: str) -> tinker.TrainingClient:
    """A new model, the same each time."""
    return ready(service_in(url, 0).create_lora_training_client(base_model=base_model, rank=RANK, seed=SEED))


def join(service: tinker.ServiceClient, model_id: str) -> tinker.TrainingClient:
    """A client of a model that another process made."""
    options = {}
    if "info" in inspect.signature(tinker.TrainingClient).parameters:
        from tinker.lib.public_interfaces.training_client import fetch_training_info

        options["info"] = service.holder.run_coroutine_threadsafe(
            fetch_training_info(service.holder, model_id)
        ).result()
    return tinker.TrainingClient(service.holder, model_seq_id=0, model_id=model_id, **options)


def data_of(lane: int, seq_id: int) -> list[types.Datum]:
    """What a call trains on, other data in every call."""
    first = 300 + 40 * seq_id + 500 * (lane > 0)
    return [datum(first, 6 + seq_id % 5), datum(first + 20, 3)]


def adam(step: int) -> types.AdamParams:
    return types.AdamParams(learning_rate=1e-2 / (1 + step), beta1=0.9, beta2=0.95, eps=1e-12)


def loss_of(client: tinker.TrainingClient) -> float:
    """The loss on data of both processes, without training."""
    data = [*data_of(0, 3), *data_of(OTHER_LANE, 3)]
    return client.forward(data, "cross_entropy").result().metrics["loss:sum"]


def trained(result: types.ForwardBackwardOutput) -> dict[str, object]:
    logprobs = [list(output["logprobs"].data) for output in result.loss_fn_outputs]
    return {"loss": result.metrics["loss:sum"], "logprobs": logprobs}


def train(client: tinker.TrainingClient, lane: int, barrier: Barrier) -> dict[str, dict[str, object]]:
    """All calls of one process; what each gave, by `lane:seq_id`. Gradients meet between two barriers, then one process steps."""
    report: dict[str, dict[str, object]] = {}
    seq_id = 0
    for step, calls in enumerate(CALLS[lane]):
        barrier.wait(WAIT_S)
        mine = range(seq_id + 1, seq_id + 1 + calls)
        futures = {at: client.forward_backward(data_of(lane, at), "cross_entropy") for at in mine}
        report |= {f"{lane}:{at}": trained(future.result()) for at, future in futures.items()}
        seq_id += calls
        barrier.wait(WAIT_S)
        if STEPPER[step] == lane:
            seq_id += 1
            report[f"{lane}:{seq_id}"] = dict(client.optim_step(adam(step)).result().metrics)
    barrier.wait(WAIT_S)
    report["end"] = {"loss": loss_of(client), "snapshot": snapshot(client)}
    return report


def snapshot(client: tinker.TrainingClient) -> list[float | None]:
    """What a sampler made of the model now says of a prompt; each process counts its samplers from 0."""
    sampler = ready(client.save_weights_and_get_sampling_client())
    return list(sampler.compute_logprobs(types.ModelInput.from_ints([1, *range(300, 312)])).result())


def second(url: str, model_id: str, barrier: Barrier, reports: "multiprocessing.Queue[dict]") -> None:
    """The second process."""
    reports.put(train(join(service_in(url, OTHER_LANE), model_id), OTHER_LANE, barrier))


def together(url: str, base_model: str) -> dict[str, object]:
    """Both processes, and a third that forgot to name a lane."""
    client = fresh(url, base_model)
    context = multiprocessing.get_context("spawn")
    barrier, reports = context.Barrier(len(CALLS)), context.Queue()
    other = context.Process(target=second, args=(url, client.model_id, barrier, reports), daemon=True)
    other.start()
    mine = train(client, 0, barrier)
    theirs = reports.get(timeout=WAIT_S)
    other.join(WAIT_S)
    ends = {"0": mine.pop("end"), str(OTHER_LANE): theirs.pop("end")}
    return {
        "model_id": client.model_id,
        "calls": mine | theirs,
        "ends": ends,
        "stray": stray(url, client.model_id),
    }


def stray(url: str, model_id: str) -> str:
    """What a further process hears that names no lane."""
    client = join(service_in(url, 0), model_id)
    try:
        client.forward_backward(data_of(0, 9), "cross_entropy").result()
    except tinker.BadRequestError as error:
        return str(error)
    return ""


def alone(url: str, base_model: str, order: list[str]) -> dict[str, object]:
    """The calls named `lane:seq_id`, or `step`, one after the other from one process."""
    client = fresh(url, base_model)
    report: list[dict[str, object]] = []
    steps = 0
    for call in order:
        if call == "step":
            report.append(dict(client.optim_step(adam(steps)).result().metrics))
            steps += 1
        else:
            lane, seq_id = map(int, call.split(":"))
            report.append(trained(client.forward_backward(data_of(lane, seq_id), "cross_entropy").result()))
    return {"calls": report, "end": {"loss": loss_of(client), "snapshot": snapshot(client)}}


if __name__ == "__main__":
    address, model_name, *rest = sys.argv[1:]
    done = alone(address, model_name, json.loads(rest[0])) if rest else together(address, model_name)
    sys.stdout.write(json.dumps(done))
