"""What a user of the xorl client does with adapters; the results as JSON on stdout.

Run inside the client's environment: python xorl_calls.py URL BASE_MODEL
"""

import json
import sys
from collections.abc import Callable

import xorl_client
from xorl_client import types
from xorl_client.client.chunked_helpers import MAX_CHUNK_BYTES_COUNT, MAX_CHUNK_LEN

# The client clips at 5 unless told otherwise.
ADAM = xorl_client.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, grad_clip_norm=0.0)


def tokens_of(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def labelled(first: int, count: int) -> xorl_client.Datum:
    """A datum as the documentation shows it: the server shifts the labels."""
    tokens = tokens_of(first, count)
    return xorl_client.Datum(
        model_input=xorl_client.ModelInput.from_ints(tokens), loss_fn_inputs={"labels": [-100, *tokens[1:]]}
    )


def targeted(first: int, count: int, **inputs: list[float]) -> xorl_client.Datum:
    """The same datum with targets that the client shifted itself."""
    tokens = tokens_of(first, count)
    return xorl_client.Datum(
        model_input=xorl_client.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], **inputs},
    )


DATA = [labelled(300, 8), labelled(500, 13), labelled(700, 2)]


def report_of(result: xorl_client.ForwardBackwardOutput) -> dict[str, object]:
    """Everything of a result that the client keeps."""
    return {
        "losses": [output["loss"]["data"][0] for output in result.loss_fn_outputs],
        "loss_shapes": [output["loss"]["shape"] for output in result.loss_fn_outputs],
        "logprobs": [output["logprobs"].tolist() for output in result.loss_fn_outputs],
        "elementwise": [output["elementwise_loss"].tolist() for output in result.loss_fn_outputs],
        "metrics": result.metrics,
    }


def step(client: xorl_client.TrainingClient, data: list[xorl_client.Datum] = DATA, **loss: object) -> dict[str, object]:
    """One training step, both calls in flight at once."""
    both = client.forward_backward(data, **{"loss_fn": "causallm_loss", **loss}), client.optim_step(ADAM)
    trained, stepped = (future.result(timeout=240) for future in both)
    return {**report_of(trained), "optim": stepped.metrics}


def loss(client: xorl_client.TrainingClient) -> float:
    """The loss without training."""
    return client.forward(DATA, loss_fn="causallm_loss").result(timeout=240).metrics["loss:sum"]


def said(call: Callable[[], object]) -> dict[str, str]:
    """The exception that a call ends in."""
    try:
        result = call()
    except Exception as error:  # noqa: BLE001  whatever a user would see
        return {"type": type(error).__name__, "text": str(error), "category": getattr(error, "category", "")}
    return {"type": "none", "text": str(result), "category": ""}


def train(service: xorl_client.ServiceClient, base_model: str) -> dict[str, object]:
    """The documented training loop, and what else the client computes."""
    client = service.create_lora_training_client(base_model=base_model, rank=4, alpha=8, model_id="policy")
    report: dict[str, object] = {"steps": [step(client) for _ in range(4)]}
    report["forward"] = report_of(client.forward(DATA, loss_fn="causallm_loss").result())
    targets = [targeted(300, 8), targeted(500, 13), targeted(700, 2)]
    report["forward_targets"] = report_of(client.forward(targets, loss_fn="cross_entropy").result())
    report["forward_alias"] = report_of(client.forward(DATA, loss_fn="per_token_ce").result())
    again = xorl_client.TrainingClient(holder=service.holder, model_id="policy", base_model=base_model)
    report["restarted_client"] = [loss(again), loss(again)]
    return report


def learn(service: xorl_client.ServiceClient, base_model: str) -> dict[str, object]:
    """Policy gradients with parameters, in both ways to give the targets."""
    client = service.create_lora_training_client(base_model=base_model, rank=4, model_id="rl")
    before = report_of(client.forward(DATA, loss_fn="causallm_loss").result())["logprobs"]

    def shifted() -> list[xorl_client.Datum]:
        return [
            targeted(first, count, logprobs=list(old), advantages=[1.0 if at % 2 else -0.5 for at in range(count - 1)])
            for (first, count), old in zip(((300, 8), (500, 13), (700, 2)), before, strict=True)
        ]

    report: dict[str, object] = {}
    for name, params in (
        ("importance_sampling", None),
        ("policy_loss", {"eps_clip": 0.2, "eps_clip_high": 0.28}),
        ("cispo", None),
    ):
        result = client.forward_backward(shifted(), loss_fn=name, loss_fn_params=params).result(timeout=240)
        report[name] = report_of(result)
    report["optim"] = client.optim_step(ADAM).result().metrics
    return report


def keep(service: xorl_client.ServiceClient, base_model: str) -> dict[str, object]:
    """Checkpoints and back."""
    client = service.create_lora_training_client(base_model=base_model, rank=4, model_id="kept")
    step(client)
    path = client.save_state("one").result().path
    report: dict[str, object] = {"path": path, "loss_at_save": loss(client), "step_after_save": step(client)}
    report["loaded"] = client.load_state_with_optimizer(path).result().path
    report["loss_loaded"] = loss(client)
    report["step_loaded"] = step(client)
    client.load_state("weights/one").result()
    report["loss_restarted"] = loss(client)
    report["step_restarted"] = step(client)
    resumed = service.create_training_client_from_state_with_optimizer(path)
    report["loss_resumed"] = loss(resumed)
    report["step_resumed"] = step(resumed)
    report["auto_path"] = client.save_state().result().path
    report["sampler_path"] = client.save_weights_for_sampler("frozen").result().path
    rest = service.create_rest_client("kept")
    info = rest.get_weights_info(path).result()
    report["info"] = {"base_model": info.base_model, "is_lora": info.is_lora, "lora_rank": info.lora_rank}
    report["listed"] = [
        (one.checkpoint_id, one.checkpoint_type, one.path) for one in rest.list_checkpoints().result().checkpoints
    ]
    runs = rest.list_training_runs(limit=10).result()
    report["runs"] = {
        run.training_run_id: [run.lora_rank, run.last_checkpoint and run.last_checkpoint.path]
        for run in runs.training_runs
    }
    report["exists"] = said(lambda: client.save_state("one").result())
    deleted = client.delete_checkpoint_from_xorl_path(path).result()
    report["deleted"] = [deleted.success, deleted.deleted_path]
    report["listed_after"] = [one.path for one in client.list_checkpoints().result().checkpoints]
    report["deleted_again"] = said(lambda: rest.delete_checkpoint(path).result())
    report["load_deleted"] = said(lambda: client.load_state(path).result())
    return report


def chunk(service: xorl_client.ServiceClient, base_model: str) -> dict[str, object]:
    """Batches that the client cuts into several requests."""
    client = service.create_lora_training_client(base_model=base_model, rank=4, model_id="chunked")
    many = [targeted(300 + index % 200, 3) for index in range(MAX_CHUNK_LEN + 352)]
    counted = client.forward_backward(many, loss_fn="cross_entropy").result(timeout=240)
    stepped = client.optim_step(ADAM).result(timeout=240)
    # The client counts four bytes for each number: a token, a target and two more each time.
    length = 320
    more = {"logprobs": [-1.0] * length, "advantages": [1.0] * length}
    large = [
        targeted(300 + index % 50, length + 1, **more) for index in range(MAX_CHUNK_BYTES_COUNT // (16 * length) + 32)
    ]
    weighed = client.forward(large, loss_fn="importance_sampling").result(timeout=400)
    return {
        "num_datums": len(many),
        "num_outputs": len(counted.loss_fn_outputs),
        "metrics": counted.metrics,
        "sum_of_losses": sum(output["loss"]["data"][0] for output in counted.loss_fn_outputs),
        "sum_of_logprobs": sum(sum(output["logprobs"].data) for output in counted.loss_fn_outputs),
        "optim": stepped.metrics,
        "num_large": len(large),
        "large_outputs": len(weighed.loss_fn_outputs),
        "large_metrics": weighed.metrics,
        "first_and_repeated": [weighed.loss_fn_outputs[at]["logprobs"].data for at in (0, 50)],
    }


def fail(service: xorl_client.ServiceClient, base_model: str) -> dict[str, object]:
    """Mistakes, each as the exception that the user sees; the model trains on after them."""
    client = service.create_lora_training_client(base_model=base_model, rank=4, model_id="clumsy")
    nobody = xorl_client.TrainingClient(holder=service.holder, model_id="nobody", base_model=base_model)
    before = loss(client)
    report: dict[str, object] = {
        "loss_fn": said(lambda: client.forward_backward(DATA, loss_fn="no_such_loss").result()),
        "advantages": said(lambda: client.forward_backward(DATA, loss_fn="importance_sampling").result()),
        "token": said(lambda: client.forward_backward([labelled(10**8, 4)], loss_fn="causallm_loss").result()),
        "empty": said(lambda: client.forward_backward([], loss_fn="causallm_loss").result()),
        "model": said(lambda: nobody.forward(DATA).result()),
        "base_model": said(lambda: service.create_lora_training_client(base_model="other", rank=4, model_id="o")),
        "rank": said(lambda: service.create_lora_training_client(base_model=base_model, rank=5, model_id="clumsy")),
        "path": said(lambda: client.load_state("xorl://clumsy/weights/none").result()),
        "push": said(lambda: client.sync_inference_weights().result()),
        "sampling": said(lambda: service.create_sampling_client("http://127.0.0.1:9", "sampler_weights/frozen")),
        "safetensors": said(lambda: client.save_full_weights_safetensors("x").result()),
        "connect": said(lambda: client.connect_inference_endpoint().result()),
    }
    added = client.add_inference_endpoint(host="127.0.0.1", port=9).result()
    report["endpoint"] = [added.success, added.message]
    report["endpoints"] = client.list_inference_endpoints().result().count
    report["removed"] = client.remove_inference_endpoint("127.0.0.1", 9).result().success
    report["loss_unchanged"] = loss(client) == before
    report["step"] = step(client)["optim"]
    return report


def end(service: xorl_client.ServiceClient, base_model: str) -> dict[str, object]:
    """Unloading and killing, and the model that needs no making."""
    gone = service.create_lora_training_client(base_model=base_model, rank=4, model_id="gone")
    fresh = loss(gone)
    step(gone)
    report: dict[str, object] = {"unloaded": gone.unload().result().model_id}
    report["after_unload"] = said(lambda: gone.forward(DATA).result())
    remade = service.create_lora_training_client(base_model=base_model, rank=4, model_id="gone")
    report["loss_remade_is_fresh"] = loss(remade) == fresh
    trained = step(remade)
    final = loss(remade)
    killed = remade.kill_session().result()
    report["killed"] = [killed.success, killed.checkpoint_path]
    revived = service.create_training_client_from_state_with_optimizer(killed.checkpoint_path)
    report["loss_revived"] = [loss(revived), final, trained["metrics"]["loss:sum"]]
    direct = xorl_client.TrainingClient(holder=service.holder, model_id="default", base_model=base_model)
    report["default"] = [step(direct)["metrics"]["loss:sum"] for _ in range(2)]
    report["default_killed"] = direct.kill_session(save_checkpoint=False).result().success
    report["health"] = direct.health_check()
    return report


PARTS = {"train": train, "learn": learn, "keep": keep, "chunk": chunk, "fail": fail, "end": end}


def main(url: str, base_model: str, *names: str) -> dict[str, object]:
    """The named parts, or all of them."""
    service = xorl_client.ServiceClient(base_url=url, api_key="contract")
    report = {name: PARTS[name](service, base_model) for name in names or PARTS}
    return {"version": xorl_client.__version__, "adam": types.AdamParams().to_dict(), **report}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))
