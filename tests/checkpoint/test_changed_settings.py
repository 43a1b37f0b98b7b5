"""What changed settings mean for a resumed run."""

from types import SimpleNamespace

from conftest import CPU, TINY_PROMPTS

from tic_grpo_trl import TICGRPOConfig
from tic_grpo_trl.checkpoint.changed_settings import Changes, settings_to_remember


def remembered(tmp_path, processes=1, dataset=TINY_PROMPTS, **config):
    trainer = SimpleNamespace(
        args=TICGRPOConfig(str(tmp_path), **CPU, **config),
        train_dataset=dataset,
        accelerator=SimpleNamespace(num_processes=processes),
        carry_over=None,
    )
    return settings_to_remember(trainer)


def test_nothing_changed(tmp_path):
    settings = remembered(tmp_path)
    assert Changes.between(settings, settings) == Changes("", "", "", "", "", processes=False, carried=0, unfit="")
    assert Changes.between({}, settings) == Changes(
        "", "", "", "", "", processes=False, carried=0, unfit=""
    )  # of an older checkpoint


def test_changes_are_sorted_by_what_they_mean(tmp_path):
    then = remembered(tmp_path, beta=0.1, max_grad_norm=1.0, learning_rate=1e-6)
    now = remembered(tmp_path, beta=0.2, max_grad_norm=2.0, learning_rate=2e-6, algorithm="grpo", num_iterations=2)
    changes = Changes.between(then, now)
    assert changes.batches == "num_iterations = 2 (was 1)"
    assert changes.scoring == "beta = 0.2 (was 0.1)"
    assert "importance_sampling_level = token (was trajectory)" in changes.algorithm
    assert changes.optimizer == "learning_rate = 2e-06 (was 1e-06)"
    assert "beta = 0.2 (was 0.1)" in changes.updates
    assert "max_grad_norm = 2.0 (was 1.0)" in changes.updates
    assert not changes.processes


def test_other_processes_and_other_data_are_other_batches(tmp_path):
    changes = Changes.between(remembered(tmp_path), remembered(tmp_path, processes=2, dataset=iter(())))
    assert changes.batches == "number of processes = 2 (was 1), number of prompts = None (was 32)"
    assert changes.processes


def test_a_pool_of_unfinished_responses_belongs_to_an_engine(tmp_path):
    def unfit(**changed):
        vllm = {"use_vllm": True, "max_carry_over": 1}
        then = remembered(tmp_path, processes=2, **vllm)
        return Changes.between(then, remembered(tmp_path, processes=2, **vllm | changed)).unfit

    assert unfit(oversampling=3.0) == ""
    assert unfit(vllm_tensor_parallel_size=2) == unfit(vllm_mode="server") == "number of pools = 1 (was 2)"
    assert unfit(use_vllm=False) == ""  # each process still has its own
