"""Carry-over with a real vLLM server. Needs the environment of `make test-vllm`."""

import pytest
import torch
from launching import free_port
from trl.trainer.utils import pad
from vllm_serving import serving
from workers.vllm_records import policy, run

from tic_grpo_trl.carry_over.pool import Response


pytestmark = pytest.mark.vllm

LONGEST, TEMPERATURE, EOS = 96, 0.8, 3  # as the worker writes
ALIVE = ["versions", "many", "at_once", "few_connections", "notebook", "exception", "aborted", "refused", "cache"]
ALIVE += ["paused", "lacking", "frozen"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address and process of a running server."""
    with serving(tmp_path_factory.mktemp("server")) as (address, process):
        yield address, str(process)


@pytest.fixture(scope="module")
def noted(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alive")
    run(folder, "carry_over_server.py", *server, *ALIVE)
    return {name: torch.load(folder / f"{name}-0.pt") for name in ALIVE}


@pytest.fixture(scope="module")
def of_two(server, noted, tmp_path_factory):
    """What each of two processes was told."""
    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    run(folder, "carry_over_server.py", *server, "cache", launcher=launcher)
    return [torch.load(folder / f"cache-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def killed(server, of_two, tmp_path_factory):
    """The server is gone afterwards."""
    folder = tmp_path_factory.mktemp("killed")
    run(folder, "carry_over_server.py", *server, "killed")
    return torch.load(folder / "killed-0.pt")


def largest_difference(noted: dict, shift: int = 0) -> float:
    """Between the recorded log-probabilities and those of the weights of each token's version, or of another one."""
    prompts, responses = [], []
    for prompt_ids, of_group in noted["groups"]:
        prompts += [torch.tensor(prompt_ids)] * len(of_group)
        responses += [Response(**each) for each in of_group]
    ids = pad(prompts, padding_value=0, padding_side="left")
    tokens, versions = (
        pad([torch.tensor(getattr(each, name)) for each in responses], padding_value=0, padding_side="right")
        for name in ("tokens", "versions")
    )
    masks = [torch.arange(ids.size(1)) >= ids.size(1) - torch.tensor([len(each) for each in prompts]).unsqueeze(1)]
    masks += [torch.arange(tokens.size(1)) < torch.tensor([len(each.tokens) for each in responses]).unsqueeze(1)]
    recorded = pad([torch.tensor(each.logps) for each in responses], padding_value=0.0, padding_side="right")
    expected = torch.zeros_like(recorded)
    for version, weights in enumerate(noted["weights"]):
        with torch.no_grad():
            logits = (
                policy(weights).double()(torch.cat([ids, tokens], 1), attention_mask=torch.cat(masks, 1).long()).logits
            )
        scores = (logits[:, ids.size(1) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        own = scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        expected = torch.where((versions + shift) % len(noted["weights"]) == version, own.float(), expected)
    return (recorded - expected)[masks[1]].abs().max().item()


def test_log_probabilities_are_those_of_the_weights_that_sampled(noted):
    noted = noted["versions"]
    versions = [each["versions"] for _, of_group in noted["groups"] for each in of_group]
    assert sum(set(each) == {0, 1, 2} for each in versions) > 8
    assert largest_difference(noted) <= 1e-4
    assert min(largest_difference(noted, shift) for shift in (1, 2)) > 1e-2


def test_tokens_stay(noted):
    noted = noted["versions"]
    for before in noted["before"]:
        for (tokens, logps), (later_tokens, later_logps) in zip(before, noted["after"], strict=True):
            assert later_tokens[: len(tokens)] == tokens
            assert later_logps[: len(logps)] == logps


def test_evaluation_between_two_calls(noted):
    noted = noted["versions"]
    responses, seconds = noted["evaluated"]
    assert responses == 4
    assert seconds < 10
    assert noted["empty"] == [True] * 3


def assert_whole(call: dict):
    """Nothing is lost or made up, and the engine's use says what happened."""
    again = sampled = 0
    for before, (tokens, logps, finished) in zip(call["before"], call["responses"], strict=True):
        assert len(tokens) == len(logps)
        assert finished == (len(tokens) == LONGEST or tokens[-1:] == [EOS])
        assert EOS not in tokens[:-1]
        sampled += len(tokens) - before
        again += before if len(tokens) > before else 0
    assert call["use"] == {"steps": 0, "slots": 0, "sampled": sampled, "prefilled_again": again}
    assert call["empty"]


def test_many_requests_at_once(noted):
    calls = noted["many"]
    for call, complete in zip(calls, (1, 16, 64), strict=True):
        assert len(call["responses"]) == 512
        assert_whole(call)
        groups = [call["responses"][start : start + 8] for start in range(0, 512, 8)]
        assert sum(all(finished for *_, finished in group) for group in groups) >= complete
    assert not all(finished for *_, finished in calls[0]["responses"])
    assert all(finished for *_, finished in calls[-1]["responses"])
    assert sum(call["use"]["prefilled_again"] for call in calls[1:]) > 0


def test_oldest_first(noted):
    """With 64 slots, the responses at the end have to wait."""
    lengths = [len(tokens) for tokens, *_ in noted["many"][0]["responses"]]
    assert min(lengths[:64]) > 0
    assert max(lengths[-64:]) == 0


def test_interrupted_while_requests_are_on_their_way(noted):
    (call,) = noted["at_once"]
    assert_whole(call)
    assert sum(finished for *_, finished in call["responses"]) < 256


@pytest.mark.parametrize("name", ["few_connections", "notebook"])
def test_all_are_finished(noted, name):
    assert_whole(noted[name])
    assert all(finished for *_, finished in noted[name]["responses"])


def test_an_exception_leaves_nothing_on_the_server(noted):
    noted = noted["exception"]
    assert noted["raised"]
    assert noted["empty"]
    assert any(tokens and not finished for tokens, _, finished in noted["responses"])  # what was written is kept


def one_line(failure: str, *words: str):
    assert "\n" not in failure
    for word in words:
        assert word in failure


def test_failures_are_named(server, noted):
    address, _ = server
    one_line(noted["aborted"], address, "other program")
    one_line(noted["refused"], address, "/v1/completions with 400")
    one_line(noted["cache"], address, "prefix cache")
    one_line(noted["lacking"], "max_carry_over", "VLLM_SERVER_DEV_MODE=1", "0.22")


def test_a_failure_reaches_all_processes(server, of_two):
    for failure in of_two:
        one_line(failure, server[0], "prefix cache")


def test_a_server_that_was_left_paused(noted):
    assert len(noted["paused"]) == 1


@pytest.mark.parametrize("name", ["frozen", "killed"])
def test_a_lost_server(server, noted, killed, name):
    lost = (noted | {"killed": killed})[name]
    one_line(lost["failure"], server[0], "does not answer", "last checkpoint")
    assert lost["seconds"] < 15
    assert lost["kept"]
    for tokens, logps, finished in lost["responses"]:
        assert len(tokens) == len(logps)
        assert finished == (len(tokens) == LONGEST or tokens[-1:] == [EOS])
