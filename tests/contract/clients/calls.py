"""What a user of the SDK does with one model, in words that every SDK since 0.16 knows; the results as JSON on stdout.

Run inside a client's environment: python calls.py URL BASE_MODEL
"""

import json
import sys

import tinker
from tinker import types

PROMPT = [1, 300, 301, 302, 303, 304]
SEED = 11


def datum(first: int, count: int) -> types.Datum:
    """count tokens from first on, each predicting the next, with weights that differ."""
    tokens = list(range(first, first + count + 1))
    weights = [0.25 * (index % 4) for index in range(count)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[count]),
            "weights": types.TensorData(data=weights, dtype="float32", shape=[count]),
        },
    )


DATA = [datum(300, 7), datum(500, 12), datum(700, 1)]
ADAM = types.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-12)


def ready(client):
    """The client itself: newer SDKs give a future of it, older ones the client."""
    return client.result() if hasattr(client, "result") else client


def step(client: tinker.TrainingClient) -> dict[str, object]:
    """One training step, both calls in flight at once; loss, log-probabilities and gradient norm."""
    both = client.forward_backward(DATA, "cross_entropy"), client.optim_step(ADAM)
    forward_backward, optim_step = (future.result() for future in both)
    return {
        "loss": forward_backward.metrics["loss:sum"],
        "logprobs": [list(output["logprobs"].data) for output in forward_backward.loss_fn_outputs],
        "optim": optim_step.metrics,
    }


def loss(client: tinker.TrainingClient) -> float:
    """The loss without training."""
    return client.forward(DATA, "cross_entropy").result().metrics["loss:sum"]


def said(client: tinker.SamplingClient) -> dict[str, object]:
    """A greedy continuation, two drawn ones, and the prompt's log-probabilities."""
    prompt = types.ModelInput.from_ints(PROMPT)
    greedy = types.SamplingParams(max_tokens=8, temperature=0.0)
    drawn = types.SamplingParams(max_tokens=8, temperature=1.0, seed=SEED, stop=[5])
    futures = client.sample(prompt, 1, greedy), client.sample(prompt, 2, drawn)
    results = [future.result() for future in futures]
    return {
        "sequences": [
            {"tokens": list(sequence.tokens), "logprobs": list(sequence.logprobs), "stop": str(sequence.stop_reason)}
            for result in results
            for sequence in result.sequences
        ],
        "prompt_logprobs": list(client.compute_logprobs(prompt).result()),
    }


def main(url: str, base_model: str) -> dict[str, object]:
    """Everything once; what each part gave."""
    service = tinker.ServiceClient(base_url=url, api_key="tml-contract")
    names = [model.model_name for model in service.get_server_capabilities().supported_models]
    client = ready(
        service.create_lora_training_client(base_model=base_model, rank=4, seed=SEED, user_metadata={"who": "calls"})
    )
    report: dict[str, object] = {"version": tinker.__version__, "offers_model": base_model in names}
    report["info"] = client.get_info().model_data.model_name
    report["steps"] = [step(client) for _ in range(3)]
    report["loss_at_save"] = loss(client)
    state = client.save_state("calls").result().path
    sampler = client.save_weights_for_sampler("calls").result().path
    report["step_after_save"] = step(client)

    resumed = ready(service.create_training_client_from_state_with_optimizer(state))
    report["loss_resumed"] = loss(resumed)
    report["step_resumed"] = step(resumed)
    restarted = ready(service.create_training_client_from_state(state))
    report["loss_restarted"] = loss(restarted)
    report["step_restarted"] = step(restarted)
    client.load_state(state).result()
    report["loss_reloaded"] = loss(client)

    report["said_by_checkpoint"] = said(ready(service.create_sampling_client(model_path=sampler)))
    report["said_by_snapshot"] = said(ready(client.save_weights_and_get_sampling_client()))
    report["said_by_base"] = said(ready(service.create_sampling_client(base_model=base_model)))
    return report


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))
