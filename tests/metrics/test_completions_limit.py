"""`completions_total_limit`: how many tables of `log_completions` stay on the disk."""

import pytest
from conftest import make_trainer

from tic_grpo_trl import TICGRPOConfig


def tables(folder):
    return [int(path.stem.split("_")[1]) for path in sorted(folder.glob("completions/*.parquet"))]


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (3, [2, 3, 4]), (1, [4])])
def test_the_newest_tables_stay(tmp_path, limit, kept):
    make_trainer(tmp_path, log_completions=True, num_completions_to_print=0, completions_total_limit=limit).train()
    assert tables(tmp_path) == kept


def test_a_resumed_run_keeps_what_it_writes(tmp_path):
    """Tables of steps that it has still to make again are neither counted nor deleted."""
    settings = {"log_completions": True, "num_completions_to_print": 0, "completions_total_limit": 2}
    make_trainer(tmp_path, **settings, save_strategy="steps", save_steps=1, max_steps=6).train()
    assert tables(tmp_path) == [5, 6]
    make_trainer(tmp_path, **settings, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tables(tmp_path) == [3, 5, 6]
    make_trainer(tmp_path, **settings, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tables(tmp_path) == [5, 6]


def test_limit_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"completions_total_limit=0 must be in \[1, inf\), for example 10"):
        TICGRPOConfig("unused", use_cpu=True, completions_total_limit=0)


def test_the_newest_tables_of_each_evaluation_stay(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 1, "per_device_eval_batch_size": 4}
    trainer = make_trainer(
        tmp_path, log_completions=True, num_completions_to_print=0, completions_total_limit=2, **settings
    )
    (tmp_path / "completions/notes.parquet").touch()  # a file of the user's
    trainer.train()
    trainer.evaluate(metric_key_prefix="again")
    names = sorted(path.stem for path in (tmp_path / "completions").iterdir())
    assert names == ["again_00004", *(f"{kind}_0000{n}" for kind in ("completions", "eval") for n in (3, 4)), "notes"]
