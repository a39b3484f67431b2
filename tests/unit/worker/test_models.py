"""Answers to jobs of models that are not in the gang's memory."""

from tests.support.worker_jobs import job

from gradstream.shared.wire import CreateModelDone, Failed, UnloadModelDone
from gradstream.worker.models import Models

CHECKPOINT = "tinker://lost/weights/last"


def models(*, checkpoint: str | None = CHECKPOINT) -> Models:
    return Models(lost=["lost"], last_checkpoint=lambda _: checkpoint)


def live(model: str = "m") -> Models:
    found = models()
    found.learn(job(model, 0, "create_model"), CreateModelDone(model_id=model))
    return found


def test_a_lost_models_job_fails_and_the_message_names_its_last_checkpoint():
    outcome = models().answer(job("lost", 5, "optim_step"), starts=0)
    assert isinstance(outcome, Failed)
    assert (outcome.code, outcome.category) == ("model_lost", "server")
    assert f"create a new model from its last checkpoint {CHECKPOINT}" in outcome.message


def test_a_lost_model_that_was_never_saved_must_start_over():
    outcome = models(checkpoint=None).answer(job("lost", 5, "forward_backward"), starts=0)
    assert "create a new model and start over" in outcome.message


def test_unloading_a_lost_model_succeeds():
    assert models().answer(job("lost", 9, "unload_model"), starts=0) == UnloadModelDone(model_id="lost")


def test_creations_and_samples_always_reach_the_engine():
    for one in [job("new", 0, "create_model"), job("new", 0, "load_weights"), job("s", 7, "sample")]:
        assert models().answer(one, starts=1) is None


def test_jobs_of_a_live_model_reach_the_engine_until_it_is_unloaded():
    found = live()
    assert found.answer(job("m", 1, "optim_step"), starts=0) is None
    found.learn(job("m", 2, "unload_model"), UnloadModelDone(model_id="m"))
    assert found.answer(job("m", 3, "optim_step"), starts=0).code == "unknown_model"


def test_another_tenants_job_on_a_live_model_does_not_reach_the_engine():
    assert live().answer(job("m", 1, "optim_step", tenant="other"), starts=0).code == "unknown_model"


def test_jobs_behind_a_failed_creation_say_why_it_failed():
    found = models()
    found.learn(
        job("m", 0, "create_model"), Failed(code="unsupported", category="user", message="rank 999 is too large")
    )
    assert "rank 999 is too large" in found.answer(job("m", 1, "optim_step"), starts=0).message


def test_a_job_that_was_running_when_two_gangs_died_is_set_aside():
    outcome = models().answer(job("s", 7, "sample"), starts=2)
    assert (outcome.code, outcome.category) == ("server_error", "server")


def test_a_job_whose_body_is_gone_fails_instead_of_reaching_the_engine():
    assert live().answer(job("m", 1, "optim_step", payload=b""), starts=0).code == "server_error"


def test_a_tenants_models_are_counted_and_one_too_many_is_refused_until_another_is_unloaded():
    found = Models(lost=[], last_checkpoint=lambda _: None, max_per_tenant=2)
    for model in "ab":
        found.learn(job(model, 0, "create_model"), CreateModelDone(model_id=model))
    for op in ("create_model", "load_weights"):
        refused = found.answer(job("c", 0, op), starts=0)
        assert isinstance(refused, Failed)
        assert (refused.code, refused.category) == ("budget_exceeded", "user")
    assert found.answer(job("d", 0, "create_model", tenant="other"), starts=0) is None
    found.learn(job("a", 9, "unload_model"), UnloadModelDone(model_id="a"))
    found.learn(job("a", 9, "unload_model"), UnloadModelDone(model_id="a"))
    assert found.answer(job("c", 0, "create_model"), starts=0) is None


def test_a_live_model_takes_no_job_of_another_tenant():
    assert live().answer(job("m", 1, "optim_step", tenant="other"), starts=0).code == "unknown_model"
    assert live().answer(job("m", 9, "unload_model", tenant="other"), starts=0).code == "unknown_model"
    assert live().answer(job("m", 1, "optim_step"), starts=0) is None


def test_a_model_may_be_made_again_behind_its_unload():
    found = live("default")
    found.learn(job("default", 4, "unload_model"), UnloadModelDone(model_id="default"))
    again = job("default", 5, "create_model")
    assert found.answer(again, starts=0) is None
    found.learn(again, CreateModelDone(model_id="default"))
    assert found.answer(job("default", 6, "optim_step"), starts=0) is None


def test_a_lost_model_that_was_made_again_and_unloaded_is_not_lost_any_more():
    found = models()
    found.learn(job("lost", 7, "create_model"), CreateModelDone(model_id="lost"))
    assert found.answer(job("lost", 8, "optim_step"), starts=0) is None
    found.learn(job("lost", 9, "unload_model"), UnloadModelDone(model_id="lost"))
    assert found.answer(job("lost", 10, "optim_step"), starts=0).code == "unknown_model"


def test_a_creation_that_failed_is_forgotten_when_the_next_one_succeeds():
    found = models()
    found.learn(job("m", 0, "create_model"), Failed(code="unsupported", category="user", message="rank 999"))
    found.learn(job("m", 1, "create_model"), CreateModelDone(model_id="m"))
    found.learn(job("m", 2, "unload_model"), UnloadModelDone(model_id="m"))
    assert "rank 999" not in found.answer(job("m", 3, "optim_step"), starts=0).message


def test_a_model_counts_once_for_its_tenant_however_often_it_was_made():
    found = Models(lost=[], last_checkpoint=lambda _: None, max_per_tenant=1)
    for seq in range(0, 6, 2):
        made = job("m", seq, "create_model")
        assert found.answer(made, starts=0) is None
        found.learn(made, CreateModelDone(model_id="m"))
        found.learn(job("m", seq + 1, "unload_model"), UnloadModelDone(model_id="m"))
