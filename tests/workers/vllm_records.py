"""The test's side of the vLLM workers: starts them, and looks at what they noted with plain logits of its own."""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import logps
from launching import finish, started
from transformers import AutoModelForCausalLM

from tic_grpo_trl.starter import STARTER_MODEL


WORKERS = Path(__file__).parent
OF_ROWS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "sampling_per_token_logps")
OF_ROWS += ("token_age", "old_per_token_logps", "importance_sampling_ratio")
MINI_BATCH, GROUP, LONGEST = 32, 8, 48  # responses, responses, tokens: as the workers train


def run(folder: Path, worker: str, *arguments, launcher=(), seconds: int = 300):
    """Run a worker to its end, or fail with the end of its log."""
    log = folder / "log.txt"
    command = [sys.executable, *launcher, WORKERS / worker, folder, *arguments]
    with (
        tempfile.TemporaryDirectory(prefix="vllm-") as scratch,  # a short path, as sockets need it
        started(command, log, cwd=folder, TMPDIR=scratch) as process,
    ):
        finish(process, log, seconds)


class Record:
    """One training run, as a worker noted it."""

    def __init__(self, path: Path):
        noted = torch.load(path)
        self.logs, self.rollouts, self.batches = noted["logs"], noted["rollouts"], noted["batches"]
        self.evaluations, self.uses, self.updates = noted["evaluations"], noted["uses"], noted["updates"]
        self.gradients, self.forwards, self.frozen = noted["gradients"], noted["forwards"], noted["frozen"]
        self.num_processes, self.oldest = noted["num_processes"], noted["oldest"]
        self.stale_warnings = [text for text in noted["warnings"] if "stale" in text]

    def metric(self, name: str) -> list[float]:
        return [entry[name] for entry in self.logs if name in entry]

    def rollout_of(self, step: int) -> dict:
        return self.rollouts[int(step // self.updates)]


def policy(weights: dict):
    model = AutoModelForCausalLM.from_pretrained(STARTER_MODEL, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return model


def own_logps(weights: dict, inputs: dict) -> torch.Tensor:
    """(B, T) log-probabilities of the policy with these weights, 0 outside of the responses."""
    if not len(inputs["completion_ids"]):  # a process whose groups all have advantage 0; models refuse empty batches
        return torch.zeros(inputs["completion_ids"].shape)
    with torch.no_grad():
        return logps(policy(weights), inputs) * inputs["completion_mask"]


def sampler_logps(inputs: dict) -> torch.Tensor:
    """(B, T) what the engine said, 0 outside of the responses. Every token of a response has one."""
    sampled, mask = inputs["sampling_per_token_logps"], inputs["completion_mask"].bool()
    assert sampled[mask].isfinite().all()
    return sampled.where(mask, 0.0)


def mismatch(rollout: dict) -> torch.Tensor:
    """(B, T) log-probability under the policy at the time of the rollout minus the sampler's."""
    return own_logps(rollout["weights"], rollout) - sampler_logps(rollout)


def real_rows(batch: dict) -> dict:
    """Without the blank rows that fill up a micro-batch."""
    rows = batch["completion_mask"].any(dim=1)
    named = {name: value for name, value in batch.items() if name in OF_ROWS}
    return batch | {name: value[rows] for name, value in named.items()}


def log_ratios(record: Record, step: int) -> torch.Tensor:
    """(B,) R of the rows of a mini-batch: its weights against those of its rollout."""
    batch = real_rows(record.batches[step])
    now, then = (own_logps(w, batch) for w in (batch["weights"], record.rollout_of(step)["weights"]))
    return (now - then).sum(dim=1)


def assert_logged(log: dict, expected: torch.Tensor, atol: float = 1e-4):
    """That these are the trajectory log-ratios of one update."""
    names = {"min": expected.min(), "max": expected.max(), "mean": expected.mean(), "std": expected.std(correction=0)}
    for name, value in names.items():
        assert abs(log[f"trajectory_ratio/log_{name}"] - value.item()) <= atol, name


def assert_weights_arrived(record: Record):
    """After they moved: the sampler's log-probabilities are the policy's, and nobody was warned."""
    assert all(log["trajectory_ratio/log_std"] > 1e-2 for i, log in enumerate(record.logs) if i % 4)
    assert len(record.rollouts) > 1
    for rollout in record.rollouts:
        assert mismatch(rollout).abs().max() <= 1e-4
    assert max(record.metric("sampling/sampling_logp_difference/max")) <= 1e-4
    assert not record.stale_warnings


def assert_old_weights_noticed(record: Record):
    """The control of `assert_weights_arrived`: without it, equal numbers could mean that nothing was compared."""
    differences = [mismatch(rollout).abs().max().item() for rollout in record.rollouts]
    assert differences[0] <= 1e-4  # it got the weights of the start
    assert min(differences[1:]) > 1e-2
    assert min(record.metric("sampling/sampling_logp_difference/max")[1:]) > 1e-2
    assert min(record.metric("sampling/mean_ratio")) < 0.99
    assert record.stale_warnings


def assert_ratios_of_the_weights(record: Record):
    """What was logged at every update follows from the weights then and at the rollout."""
    for step, log in enumerate(record.logs):
        expected = log_ratios(record, step)
        assert_logged(log, expected)
        assert expected.std() > 1e-2 or step % 4 == 0


def when_sampled(record: Record, call: int, inputs: dict) -> torch.Tensor:
    """(B, T) log-probabilities of a rollout's tokens under the weights that sampled each, 0 outside of responses."""
    age, logps = inputs["token_age"], own_logps(record.rollouts[call]["weights"], inputs)
    for late in age[age > 0].unique().tolist():
        logps = torch.where(age == late, own_logps(record.rollouts[call - late]["weights"], inputs), logps)
    return logps


def assert_recorded_when_sampled(*records: Record):
    """Of every token of all processes, also in the mini-batches and in the evaluations in between.

    Controls: the current weights would be the wrong ones for old tokens, and the last ones for the others.
    """
    wrong = {"current": [], "last": []}
    for record in records:
        rollouts_with_old_tokens = 0
        for call, rollout in enumerate(record.rollouts):
            recorded, age = sampler_logps(rollout), rollout["token_age"]
            written = rollout["completion_mask"].bool()
            assert not age[~written].any()
            assert age.max() <= min(call, record.oldest)
            assert (when_sampled(record, call, rollout) - recorded).abs().max() <= 1e-4
            if (age > 0).any():
                rollouts_with_old_tokens += 1
                wrong["current"].append(mismatch(rollout)[age > 0].abs().max().item())
            if call and (written & (age == 0)).any():
                last = own_logps(record.rollouts[call - 1]["weights"], rollout) - recorded
                wrong["last"].append(last[written & (age == 0)].abs().max().item())
        assert rollouts_with_old_tokens > 1
        for step, batch in enumerate(record.batches):
            batch = real_rows(batch)
            difference = when_sampled(record, int(step // record.updates), batch) - sampler_logps(batch)
            assert (difference.abs() <= 1e-4).all()
        for evaluation in record.evaluations:
            assert mismatch(evaluation).abs().max() <= 1e-4
    assert min(max(wrong["current"]), max(wrong["last"])) > 1e-2


def assert_old_weights_noticed_in_current_tokens(record: Record):
    """The control of the alarm that leaves out old tokens: an engine that keeps the weights of the start."""
    current = [(rollout["token_age"] == 0) & rollout["completion_mask"].bool() for rollout in record.rollouts]
    wrong = [
        mismatch(r)[tokens].abs().max() for r, tokens in zip(record.rollouts, current, strict=True) if tokens.any()
    ]
    assert wrong[0] <= 1e-4
    assert min(wrong[1:]) > 1e-2
    assert record.stale_warnings


def of_several_versions(record: Record) -> int:
    """How many responses more than one version of the weights wrote."""
    written = [
        ages[mask.bool()].unique()
        for rollout in record.rollouts
        for ages, mask in zip(rollout["token_age"], rollout["completion_mask"], strict=True)
    ]
    return sum(len(ages) > 1 for ages in written)


def prompts_of(rollout: dict) -> list[tuple]:
    """The prompt of each response."""
    pairs = zip(rollout["prompt_ids"], rollout["prompt_mask"].bool(), strict=True)
    return [tuple(ids[mask].tolist()) for ids, mask in pairs]


def assert_each_prompt_once(records: list[Record]):
    """All responses to a prompt are in one rollout, in whole groups, and nothing is left in the end.

    `records`: those of all processes.
    """
    seen, each_rollout = Counter(), list(zip(*(record.rollouts for record in records), strict=True))
    for rollouts in each_rollout:
        of_rollout = Counter(prompt for rollout in rollouts for prompt in prompts_of(rollout))
        assert set(of_rollout.values()) == {GROUP}
        seen.update(of_rollout.keys())
    assert set(seen.values()) == {1}
    waiting = [sum(len(rollout["waiting"]) for rollout in rollouts) for rollouts in each_rollout]
    assert waiting[-1] == 0
    assert min(waiting[:-1]) > 0


def assert_carried_ratios(records: list[Record]) -> float:
    """What was logged at every update is the weights then over what was recorded; a first update isn't on-policy.

    There is no alarm. `records`: those of all processes. Returns the mean log-ratio of old tokens in a first update,
    from which an alarm would start if it looked at them: the one that is farthest from 0.
    """
    first, of_old = [], []
    for step, log in enumerate(records[0].logs):
        batches = [real_rows(record.batches[step]) for record in records]
        per_token = [own_logps(batch["weights"], batch) - sampler_logps(batch) for batch in batches]
        assert_logged(log, torch.cat([each.sum(dim=1) for each in per_token]))
        if step % records[0].updates == 0:
            first.append(log["trajectory_ratio/log_std"])
            old = [each[batch["token_age"] > 0] for each, batch in zip(per_token, batches, strict=True)]
            of_old.append(torch.cat(old).sum().item() / max(1, sum(map(len, old))))
    assert first[0] < 1e-3
    assert max(first) > 1e-2
    current = records[0].metric("sampling/mean_ratio")
    assert current
    assert all(ratio == pytest.approx(1, abs=1e-4) for ratio in current)
    assert not any(record.stale_warnings for record in records)
    return max(of_old, key=abs)


def largest_gradient_error(gradients: dict, model) -> float:
    """Relative, of all parameters together; the model's own are the expected ones."""
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    error = sum((gradients[n] - expected[n]).square().sum() for n in expected)
    return float((error / sum(g.square().sum() for g in expected.values())).sqrt())
