"""What a user of the xorl client does on a server that trains full weights; the results as JSON on stdout.

Run inside the client's environment: python xorl_full.py URL BASE_MODEL
"""

import json
import sys

import xorl_client
from xorl_calls import loss, said, step


def main(url: str, base_model: str) -> dict[str, object]:
    """Everything once; what each part gave."""
    service = xorl_client.ServiceClient(base_url=url, api_key="contract")
    direct = xorl_client.TrainingClient(holder=service.holder, model_id="default", base_model=base_model)
    report: dict[str, object] = {"loss_first": loss(direct)}
    client = service.create_training_client(base_model=base_model)
    report["loss_created"] = loss(client)
    report["steps"] = [step(client) for _ in range(4)]
    report["loss_trained"] = loss(client)

    report["asleep"] = service.holder.post_sync("/sleep", {})["status"]
    report["while_asleep"] = said(lambda: step(client))
    report["awake"] = service.holder.post_sync("/wake_up", {})["status"]
    report["loss_awake"] = loss(client)

    killed = client.kill_session(save_checkpoint=False).result()
    report["killed"] = [killed.success, killed.checkpoint_path]
    report["loss_killed"] = loss(client)
    report["step_killed"] = step(client)["optim"]
    reset = {"model_id": "default", "save_checkpoint": False, "reset_weights": True}
    report["reset"] = service.holder.post_sync("/api/v1/kill_session", reset)["success"]
    report["loss_reset"] = loss(client)

    report["second_model"] = said(lambda: service.create_training_client(base_model=base_model, model_id="second"))
    runs = service.create_rest_client().list_training_runs().result().training_runs
    report["runs"] = [[run.training_run_id, run.is_lora, run.lora_rank] for run in runs]
    return report


def keep(url: str, base_model: str) -> dict[str, object]:
    """Checkpoints and back."""
    service = xorl_client.ServiceClient(base_url=url, api_key="contract")
    client = service.create_training_client(base_model=base_model)
    step(client)
    path = client.save_state("full-one").result(timeout=240).path
    report: dict[str, object] = {"path": path, "loss_at_save": loss(client), "step_after_save": step(client)}
    client.load_state_with_optimizer(path).result(timeout=240)
    report["loss_loaded"] = loss(client)
    report["step_loaded"] = step(client)
    client.load_state(path).result(timeout=240)
    report["loss_restarted"] = loss(client)
    info = service.create_rest_client().get_weights_info(path).result()
    report["info"] = [info.base_model, info.is_lora, info.lora_rank]
    report["sampler_path"] = client.save_weights_for_sampler("frozen").result(timeout=240).path
    report["killed"] = client.kill_session().result().checkpoint_path
    return report


if __name__ == "__main__":
    what = {"main": main, "keep": keep}[sys.argv[3]]
    sys.stdout.write(json.dumps(what(*sys.argv[1:3])))
