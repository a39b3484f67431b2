"""The stock xorl client, unmodified, does everything that it can do, on a server of adapters and on one of full weights."""

import re

import pytest
from tests.contract.clients.running import REPOSITORY, XORL, Client, needed
from tests.contract.clients.workplace import MODEL

from examples.local_server import local_server

pytestmark = [pytest.mark.e2e, pytest.mark.clients, pytest.mark.slow, pytest.mark.timeout(900)]

# What changes when datums share rows or not: the order in which float32 numbers are added.
CLOSE = 1e-4
_NUM_TARGETS = 20
# The main name of the base model that the server knows as MODEL, too.
SERVED = "gradstream/tiny-qwen3-shakespeare"


def client_of(url, folder):
    needed(XORL)
    return Client(name=XORL, folder=folder, url=url)


@pytest.fixture(scope="module")
def part(server, workplace):
    """What a part of xorl_calls.py saw; each runs once."""
    seen = {}

    def run(name, *, timeout_s=300.0):
        if name not in seen:
            client = client_of(server, workplace)
            seen[name] = client.json("xorl_calls.py", server, MODEL, name, timeout_s=timeout_s)[name]
        return seen[name]

    return run


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory, workplace):
    """The training part against a server that gives each datum a row of its own."""
    overrides = {"model_aliases": f"[{MODEL}]", "max_lora_rank": "32", "enable_packing": "false"}
    folder = tmp_path_factory.mktemp("unpacked")
    needed(XORL)
    with local_server(REPOSITORY / "configs" / "tiny.yaml", output_dir=folder, overrides=overrides) as running:
        yield client_of(running.url, workplace).json("xorl_calls.py", running.url, MODEL, "train")["train"]


@pytest.fixture(scope="module")
def full_server(tmp_path_factory):
    """The URL of a server that trains full weights."""
    overrides = {"model_aliases": f"[{MODEL}]", "enable_lora": "false"}
    folder = tmp_path_factory.mktemp("full")
    needed(XORL)
    with local_server(REPOSITORY / "configs" / "tiny.yaml", output_dir=folder, overrides=overrides) as running:
        yield running.url


@pytest.fixture(scope="module")
def full(full_server, workplace):
    """What xorl_full.py saw."""
    return client_of(full_server, workplace).json("xorl_full.py", full_server, MODEL, "main")


@pytest.fixture(scope="module")
def full_kept(full, full_server, workplace):
    """What xorl_full.py saw of checkpoints, after everything else."""
    del full
    return client_of(full_server, workplace).json("xorl_full.py", full_server, MODEL, "keep")


def test_the_loop_in_the_readme_lowers_its_loss(tmp_path, workplace):
    needed(XORL)
    programs = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    (program,) = [text for text in programs if "import xorl_client" in text]
    with local_server(REPOSITORY / "configs" / "tiny_full.yaml", output_dir=tmp_path) as running:
        said = client_of(running.url, workplace).run("-c", program.replace("http://127.0.0.1:5555", running.url))
    losses = [float(line.split()[1]) for line in said.splitlines()]
    assert [round(losses[0], 2), round(losses[-1], 2)] == [14.60, 3.20]


def test_the_documented_loop_lowers_the_loss(part):
    losses = [step["metrics"]["loss:mean"] for step in part("train")["steps"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5


def test_each_datum_has_its_loss_and_a_number_for_each_label_but_the_first(part):
    for step in part("train")["steps"]:
        assert [len(values) for values in step["logprobs"]] == [7, 12, 1]
        assert step["loss_shapes"] == [[1]] * 3
        for loss, logprobs, elementwise in zip(step["losses"], step["logprobs"], step["elementwise"], strict=True):
            assert elementwise == [-value for value in logprobs]
            assert loss == pytest.approx(sum(elementwise) / len(elementwise), rel=1e-5)


def test_metrics_say_sum_mean_and_number_of_the_targets(part):
    for step in part("train")["steps"]:
        metrics = step["metrics"]
        assert metrics["valid_tokens:sum"] == _NUM_TARGETS
        assert metrics["loss:sum"] == pytest.approx(-sum(map(sum, step["logprobs"])), rel=1e-5)
        assert metrics["loss:mean"] == pytest.approx(metrics["loss:sum"] / _NUM_TARGETS)
        assert step["optim"]["learning_rate"] == 1e-2
        assert step["optim"]["grad_norm"] > 0


def test_labels_and_targets_shifted_by_the_client_give_the_same_numbers(part):
    train = part("train")
    assert train["forward"]["logprobs"] == train["forward_targets"]["logprobs"] == train["forward_alias"]["logprobs"]
    assert train["forward"]["metrics"] == train["forward_targets"]["metrics"]


def test_a_client_that_counts_from_one_again_is_answered_anew(part):
    train = part("train")
    assert train["restarted_client"] == [train["forward"]["metrics"]["loss:sum"]] * 2


def leaves(node, path=()):
    """Every number of nested dicts and lists, by its path."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {where: value for key, item in items for where, value in leaves(item, (*path, key)).items()}
    return {path: node}


def test_without_packing_the_same_numbers_come_out(part, unpacked):
    packed, alone = leaves(part("train")), leaves(unpacked)
    assert packed.keys() == alone.keys()
    for where, value in packed.items():
        assert alone[where] == pytest.approx(value, rel=CLOSE, abs=CLOSE), where


@pytest.mark.parametrize("name", ["importance_sampling", "policy_loss", "cispo"])
def test_policy_losses_of_the_sampling_policy_itself_weigh_each_token_by_its_advantage(part, name):
    seen = part("learn")[name]
    advantages = [[1.0 if at % 2 else -0.5 for at in range(len(values))] for values in seen["logprobs"]]
    assert seen["metrics"]["ratio:mean"] == 1.0
    for values, elementwise, weights in zip(seen["logprobs"], seen["elementwise"], advantages, strict=True):
        expected = [-a * (value if name == "cispo" else 1.0) for a, value in zip(weights, values, strict=True)]
        assert elementwise == pytest.approx(expected, rel=1e-5)


def test_a_step_follows_from_policy_gradients(part):
    assert part("learn")["optim"]["grad_norm"] > 0


def test_a_checkpoint_with_its_optimizer_goes_on_to_the_same_bits(part):
    keep = part("keep")
    assert keep["loss_loaded"] == keep["loss_at_save"]
    assert keep["step_loaded"] == keep["step_after_save"]
    assert keep["loss_resumed"] == keep["loss_at_save"]
    assert keep["step_resumed"] == keep["step_after_save"]


def test_a_checkpoint_without_its_optimizer_has_the_same_weights_and_begins_anew(part):
    keep = part("keep")
    assert keep["loss_restarted"] == keep["loss_at_save"]
    assert keep["step_restarted"]["logprobs"] == keep["step_after_save"]["logprobs"]
    assert keep["step_restarted"]["optim"]["step"] == 1.0
    assert keep["step_after_save"]["optim"]["step"] == 2.0


def test_checkpoints_are_listed_described_and_deleted_by_their_xorl_paths(part):
    keep = part("keep")
    paths = [path for _, _, path in keep["listed"]]
    # The last is what the model left at its beginning.
    assert paths == [keep["sampler_path"], keep["auto_path"], keep["path"], "xorl://kept/weights/000000"]
    assert keep["path"] == keep["loaded"] == "xorl://kept/weights/one"
    assert keep["sampler_path"] == "xorl://kept/sampler_weights/frozen"
    assert keep["auto_path"].startswith("xorl://kept/weights/checkpoint-")
    assert [kind for _, kind, _ in keep["listed"]] == ["sampler", "training", "training", "training"]
    assert keep["info"] == {"base_model": SERVED, "is_lora": True, "lora_rank": 4}
    assert keep["runs"]["kept"] == [4, keep["auto_path"]]
    assert keep["deleted"] == [True, keep["path"]]
    assert keep["listed_after"] == [*paths[:2], paths[3]]


def test_a_name_that_is_taken_fails_as_409_and_what_is_deleted_is_not_found(part):
    keep = part("keep")
    assert (keep["exists"]["type"], keep["exists"]["category"]) == ("RequestFailedError", "user")
    assert "409: " in keep["exists"]["text"]
    assert keep["deleted_again"]["type"] == "NotFoundError"
    assert (keep["load_deleted"]["type"], keep["load_deleted"]["category"]) == ("RequestFailedError", "user")
    assert keep["path"] in keep["load_deleted"]["text"]


def test_a_batch_that_the_client_cuts_into_pieces_comes_back_whole(part):
    chunk = part("chunk", timeout_s=600.0)
    assert chunk["num_outputs"] == chunk["num_datums"] == 2400
    assert chunk["metrics"]["valid_tokens:sum"] == 2 * 2400
    assert chunk["metrics"]["loss:sum"] == pytest.approx(-chunk["sum_of_logprobs"], rel=1e-6)
    assert chunk["optim"]["grad_norm"] > 0
    assert chunk["large_outputs"] == chunk["num_large"]
    assert chunk["large_metrics"]["valid_tokens:sum"] == 320 * chunk["num_large"]
    first, repeated = chunk["first_and_repeated"]
    assert first == repeated


@pytest.mark.parametrize(
    ("mistake", "kind", "text"),
    [
        ("loss_fn", "BadRequestError", "loss_fn: 'no_such_loss' is not offered here"),
        ("advantages", "BadRequestError", "data[0].loss_fn_inputs.advantages: missing"),
        ("token", "BadRequestError", "is outside the vocabulary"),
        ("empty", "BadRequestError", "data: there are no datums"),
        ("model", "NotFoundError", "there is no model 'nobody'"),
        ("base_model", "BadRequestError", "does not serve 'other'"),
        ("rank", "BadRequestError", "lora.rank was 4, now 5"),
        ("path", "RequestFailedError", "there is no checkpoint xorl://clumsy/weights/none"),
        ("push", "BadRequestError", "is not offered yet"),
        ("sampling", "BadRequestError", "is not offered yet"),
        ("safetensors", "NotFoundError", "save_weights_for_sampler"),
        ("connect", "NotFoundError", "add_inference_endpoint"),
    ],
)
def test_a_mistake_is_an_exception_that_says_what_was_wrong(part, mistake, kind, text):
    seen = part("fail")[mistake]
    assert seen["type"] == kind
    assert text in seen["text"]


def test_after_all_mistakes_the_model_is_as_it_was_and_trains(part):
    fail = part("fail")
    assert fail["loss_unchanged"]
    assert fail["step"]["step"] == 1.0


def test_an_inference_server_that_does_not_answer_is_not_registered(part):
    fail = part("fail")
    assert fail["endpoint"][0] is False
    assert "127.0.0.1:9 is not registered" in fail["endpoint"][1]
    assert (fail["endpoints"], fail["removed"]) == (0, False)


def test_an_unloaded_model_is_gone_and_begins_anew_when_it_is_made_again(part):
    end = part("end")
    assert end["unloaded"] == "gone"
    assert end["after_unload"]["type"] == "NotFoundError"
    assert end["loss_remade_is_fresh"]


def test_a_killed_session_left_a_checkpoint_from_which_it_goes_on(part):
    end = part("end")
    assert end["killed"] == [True, "xorl://gone/weights/session_gone_final"]
    revived, final, _ = end["loss_revived"]
    assert revived == final


def test_the_model_that_needs_no_making_trains(part):
    first, second = part("end")["default"]
    assert second < first


def test_the_health_check_tells_of_the_worker(part):
    health = part("end")["health"]
    assert (health["status"], health["engine_running"]) == ("healthy", True)
    assert health["worker"]["heartbeat_age_s"] < 15


def test_full_weights_need_no_making_and_the_client_that_makes_them_finds_the_same(full):
    assert full["loss_created"] == full["loss_first"]
    assert "there is no model" not in full["second_model"]["text"]
    assert "its one model, whose name is 'default'" in full["second_model"]["text"]
    assert full["runs"] == [["default", False, None]]


def test_full_weights_learn(full):
    losses = [step["metrics"]["loss:mean"] for step in full["steps"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5


def test_full_weights_sleep_and_wake_up_unchanged_and_train_only_awake(full):
    assert (full["asleep"], full["awake"]) == ("sleeping", "awake")
    assert (full["while_asleep"]["type"], full["while_asleep"]["category"]) == ("RequestFailedError", "user")
    assert "wake_up" in full["while_asleep"]["text"]
    assert full["loss_awake"] == full["loss_trained"]


def test_a_killed_session_of_full_weights_keeps_them_without_the_optimizer_unless_told_to_reset_them(full):
    assert full["killed"] == [True, None]
    assert full["loss_killed"] == full["loss_trained"]
    assert full["step_killed"]["step"] == 1.0
    assert full["reset"]
    assert full["loss_reset"] == full["loss_first"]


def test_a_checkpoint_of_full_weights_goes_on_to_the_same_bits_or_begins_anew_with_its_weights(full_kept):
    assert full_kept["path"] == "xorl://default/weights/full-one"
    assert full_kept["loss_loaded"] == full_kept["loss_restarted"] == full_kept["loss_at_save"]
    assert full_kept["step_loaded"] == full_kept["step_after_save"]


def test_full_weights_are_described_frozen_and_saved_when_their_session_is_killed(full_kept):
    assert full_kept["info"] == [SERVED, False, None]
    assert full_kept["sampler_path"] == "xorl://default/sampler_weights/frozen"
    assert full_kept["killed"] == "xorl://default/weights/session_default_final"
