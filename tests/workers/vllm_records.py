"""The test's side of the vLLM workers: starts them, and looks at what they noted with plain logits of its own."""

import sys
import tempfile
from pathlib import Path

import torch
from conftest import logps
from launching import finish, started
from transformers import AutoModelForCausalLM

from tic_grpo_trl.starter import STARTER_MODEL


WORKERS = Path(__file__).parent
OF_ROWS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "sampling_per_token_logps")
MINI_BATCH, LONGEST = 32, 48  # responses, tokens: as the workers train


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
        self.gradients, self.forwards, self.frozen = noted["gradients"], noted["forwards"], noted["frozen"]
        self.num_processes = noted["num_processes"]
        self.stale_warnings = [text for text in noted["warnings"] if "stale" in text]

    def metric(self, name: str) -> list[float]:
        return [entry[name] for entry in self.logs if name in entry]

    def rollout_of(self, step: int) -> dict:
        return self.rollouts[step // 4]


def policy(weights: dict):
    model = AutoModelForCausalLM.from_pretrained(STARTER_MODEL, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return model


def own_logps(weights: dict, inputs: dict) -> torch.Tensor:
    """(B, T) log-probabilities of the policy with these weights, 0 outside of the responses."""
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


def largest_gradient_error(gradients: dict, model) -> float:
    """Relative, of all parameters together; the model's own are the expected ones."""
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    error = sum((gradients[n] - expected[n]).square().sum() for n in expected)
    return float((error / sum(g.square().sum() for g in expected.values())).sqrt())
