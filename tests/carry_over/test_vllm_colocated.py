"""Responses that a real vLLM engine in the trainer's process writes with several versions of the weights: what it said
of every token is computed again from plain logits. Needs the environment of `make test-vllm`."""

import pytest
import torch
from transformers import AutoTokenizer
from workers.vllm_records import policy, run

from tic_grpo_trl.starter import STARTER_MODEL


pytestmark = pytest.mark.vllm

INTERRUPTED = ["plain", "short", "options", "past the model's length"]
EOS = AutoTokenizer.from_pretrained(STARTER_MODEL).eos_token_id


@pytest.fixture(scope="module", params=["sync", "async", "tensor parallel"])
def everywhere(request, tmp_path_factory):
    """What each process noted: with an engine that looks at every step before the next, one that begins the next
    before, as on GPUs, and one of these whose tensors are spread over two processes."""
    folder = tmp_path_factory.mktemp("run")
    processes = 2 if request.param == "tensor parallel" else 1
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2") if processes == 2 else ()
    run(folder, "vllm_carry_over.py", "sync" if request.param == "sync" else "async", launcher=launcher)
    everywhere = [torch.load(folder / f"{index}.pt") for index in range(processes)]
    assert all(noted["ahead"] == (request.param != "sync") for noted in everywhere)
    return everywhere


@pytest.fixture
def noted(everywhere):
    return everywhere[0]


def responses(scenario: dict) -> list[tuple[list[int], dict]]:
    """Prompt and last state of every response."""
    last = {}
    for call in scenario["calls"]:
        last |= call["after"]
    return [(prompt, each) for prompt, group in last.values() for each in group]


def own_logps(model, prompt: list[int], tokens: list[int], settings: dict) -> torch.Tensor:
    """(T,) of the tokens of a whole response, as if it had been sampled at once with these settings."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    penalty, kwargs = settings.get("repetition_penalty", 1.0), settings.get("generation_kwargs") or {}
    for place, row in enumerate(logits):
        seen = torch.tensor(prompt + tokens[:place]).unique()
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        if place < kwargs.get("min_tokens", 0):
            row[EOS] = -torch.inf
    logps = (logits / settings.get("temperature", 1.0)).log_softmax(-1)
    return logps.gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("name", INTERRUPTED)
def test_log_probabilities_are_those_of_the_segment_s_weights(noted, name):
    """With a control that takes the weights of the next call, and one that takes a response for one version's."""
    scenario = noted[name]
    models = [policy(call["weights"]) for call in scenario["calls"]]
    error, next_s, one_s, spans = 0.0, 0.0, [], []
    for prompt, response in responses(scenario):
        tokens, versions = response["tokens"], torch.tensor(response["versions"], dtype=torch.long)
        assert len(tokens) == len(versions) == len(response["logps"])
        if not tokens:
            continue
        logps = torch.stack([own_logps(model, prompt, tokens, scenario["settings"]) for model in models])
        recorded, places = torch.tensor(response["logps"]), torch.arange(len(tokens))
        error = max(error, (logps[versions, places] - recorded).abs().max().item())
        next_s = max(next_s, (logps[(versions + 1) % len(models), places] - recorded).abs().max().item())
        spans.append(len(versions.unique()))
        if spans[-1] > 1:
            one_s.append((logps[versions[-1]] - recorded).abs().max().item())
    assert error <= 1e-4
    assert next_s > 1e-2
    assert max(one_s) > 1e-2
    assert max(spans) >= 3 or name == "short"


@pytest.mark.parametrize("name", INTERRUPTED)
def test_what_was_written_stays(noted, name):
    went_on = 0
    for call in noted[name]["calls"]:
        for number, group in call["before"].items():
            for before, after in zip(group, call["after"][number][1], strict=True):
                written = len(before["tokens"])
                for part in ("tokens", "logps", "versions"):
                    assert after[part][:written] == before[part]
                assert after["finished"] >= before["finished"]
                assert not before["finished"] or len(after["tokens"]) == written
                went_on += 0 < written < len(after["tokens"])
    assert went_on > 10


@pytest.mark.parametrize(("name", "longest"), [("plain", 48), ("short", 20), ("past the model's length", 500)])
def test_where_responses_end(noted, name, longest):
    """At the end-of-sequence token, the longest length or that of the model (128), and nowhere else."""
    ends = {"eos": [], "longest": [], "model": []}
    for prompt, response in responses(noted[name]):
        tokens = response["tokens"]
        at = {
            "eos": tokens[-1:] == [EOS] and not noted[name]["settings"].get("generation_kwargs", {}).get("ignore_eos"),
            "longest": len(tokens) == longest,
            "model": len(prompt) + len(tokens) == 128,
        }
        assert response["finished"] == any(at.values())
        for reason, ended in at.items():
            if ended:
                ends[reason].append((len(tokens), len(set(response["versions"]))))
    if name == "short":
        assert max(versions for _, versions in ends["longest"]) > 1
    elif name == "plain":
        assert len({length for length, _ in ends["eos"]}) > 3
    else:
        assert max(versions for _, versions in ends["model"]) > 1


def test_min_tokens_are_those_of_the_whole_response(noted):
    """20 of them, interrupted before and after. Without the option many end earlier."""
    lengths, interrupted = [], []
    for _, response in responses(noted["options"]):
        tokens, versions = response["tokens"], response["versions"]
        assert EOS not in tokens[:20]
        if response["finished"]:
            lengths.append(len(tokens))
        interrupted += [place for place in range(1, len(tokens)) if versions[place] != versions[place - 1]]
    assert min(lengths) < 24
    assert min(interrupted) < 20 < max(interrupted)
    assert any(EOS in response["tokens"][:20] for _, response in responses(noted["plain"]))


def test_a_repeated_run_samples_the_same(noted):
    """And the responses of a group differ: each segment of each has a seed of its own."""
    for call, again in zip(noted["plain"]["calls"], noted["again"]["calls"], strict=True):
        assert call["after"] == again["after"]
        assert call["use"] == again["use"]
    texts = [tuple(response["tokens"]) for _, response in responses(noted["past the model's length"])]
    long = [text for text in texts if len(text) > 50]
    assert len(set(long)) == len(long) > 10


@pytest.mark.parametrize("name", INTERRUPTED)
def test_use_of_the_engine(noted, name):
    for call in noted[name]["calls"]:
        pairs = [
            (len(before["tokens"]), len(after["tokens"]))
            for number, group in call["before"].items()
            for before, after in zip(group, call["after"][number][1], strict=True)
        ]
        use = call["use"]
        assert use["sampled"] == sum(after - before for before, after in pairs)
        assert use["prefilled_again"] == sum(before for before, after in pairs if after > before)
        assert use["slots"] == 16
        longest = max(after - before for before, after in pairs)
        assert max(longest, use["sampled"] / 16) <= use["steps"] <= longest + 1 + (name == "past the model's length")


@pytest.mark.parametrize("name", INTERRUPTED)
def test_the_engine_stops_as_soon_as_it_may(noted, name):
    """Asked after every step that ended responses, and at no other; nothing stays in the engine."""
    for call in noted[name]["calls"]:
        assert call["asked"] == sorted(set(call["asked"]))
        assert call["left"] == 0
        assert len(call["released"]) == 1
        assert not all(each["finished"] for _, group in call["after"].values() for each in group)


def test_evaluation_between_two_calls(noted):
    """With the weights of the last call, and nothing of its responses in between."""
    for call in noted["plain"]["calls"]:
        model, evaluated = policy(call["weights"]), call["evaluated"]
        for prompt, tokens, logps in zip(*evaluated.values(), strict=True):
            assert (own_logps(model, prompt, tokens, {}) - torch.tensor(logps)).abs().max() <= 1e-4


def test_an_interrupt_leaves_nothing_in_the_engine(noted):
    """What was sampled is kept."""
    error = noted["error"]
    assert error["left"] == 0
    model = policy(error["weights"])
    written = [(prompt, each) for prompt, group in error["written"].values() for each in group if each["tokens"]]
    assert len(written) == 16
    for prompt, response in written:
        own = own_logps(model, prompt, response["tokens"], {})
        assert (own - torch.tensor(response["logps"])).abs().max() <= 1e-4


def test_a_prefix_cache_with_old_weights_is_an_error(noted):
    assert "prefix cache" in noted["others"]
    assert "\n" not in noted["others"]


def test_weights_are_loaded_when_they_changed(noted):
    assert noted["loads"] == [1, 1, 2]


def test_an_engine_that_sleeps(noted):
    """It discards the weights, so that they are loaded again although they are the same."""
    call = [("load",), ("wake up", "weights"), ("wake up", "kv_cache"), ("step",), ("sleep", 2)]
    assert noted["asleep"] == 2 * call


def test_processes_that_share_an_engine_hold_the_same_responses(everywhere):
    for noted in everywhere[1:]:
        for name in INTERRUPTED:
            for call, first in zip(noted[name]["calls"], everywhere[0][name]["calls"], strict=True):
                for part in ("after", "released", "use", "asked", "left"):
                    assert call[part] == first[part]
