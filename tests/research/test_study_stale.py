"""The study of stale data: its plan, its choice of settings, its file of results, and small real runs that restart."""

import json
import math
from dataclasses import replace
from itertools import product
from statistics import stdev

import numpy as np
import pytest
from stale_lines import line, write_lines

from research.study import stale_plan, stale_results
from research.study.runs import SETTINGS, Run, execute
from research.study.stale import Study, study_stale
from research.study.stale_outcome import Outcome, engine_step_ratio, mean_curve, steps_to
from research.study.stale_plan import OURS, PLANS, RETUNED, RIVALS, SELECTION_SEEDS, Condition, parts_of
from research.study.stale_results import OPTIONS, ResultsFile, StaleResult, settings_of
from research.study.tables import t_interval
from research.study.tuning import candidates
from tic_grpo_trl.algorithms import ALGORITHMS


STARTER = PLANS["stale"]["starter"]


def small_part(*rules, selection=True):
    """The starter at lag 0 and 2 with some rules, chosen at both lags."""
    part = parts_of("stale", ["starter"], rules, lags=[0, 2], carry_overs=[])["starter"]
    return replace(part, selection=part.conditions if selection else ())


# Runs and the plan


def test_a_lag_is_part_of_a_run_and_none_keeps_the_names_of_earlier_runs():
    assert Run("tic_grpo", 0).name == "tic_grpo-seed0-df41e80e2a"
    old = Run("grpo:delta=3", 2, 48, 16, "long", 100, 48, (("learning_rate", 1e-4),))
    assert old.name == "grpo-seed2-4a15eccbf8"
    assert len({Run("tic_grpo", 0, lag=lag).name for lag in (0, 1, 2)}) == 3
    config = Run("tic_grpo", 0, lag=1).config("unused")
    assert (config.behaviour_policy, config.save_strategy) == ("sampler", "no")
    assert Run("tic_grpo", 0).config("unused").behaviour_policy == "trainer"


def test_conditions_differ_only_in_the_age_of_their_data():
    runs = [Condition("starter", *age).run("grpo", 3, 96, 24) for age in ((0, 0), (2, 0), (0, 2))]
    configs = [run.config("unused") for run in runs]
    assert {config.behaviour_policy for config in configs} == {"sampler"}
    assert [config.max_carry_over for config in configs] == [0, 0, 2]
    assert [run.lag for run in runs] == [0, 2, 0]
    assert [Condition.of(json.loads(json.dumps(run.fields))) for run in runs] == [
        Condition("starter", *age) for age in ((0, 0), (2, 0), (0, 2))
    ]


@pytest.mark.parametrize("part", PLANS["stale"])
def test_every_candidate_is_valid_and_the_first_bounds_are_the_published_ones(part):
    plan = PLANS["stale"][part]
    assert part == "length" or {OURS, RETUNED} <= set(plan.rules)
    for rule in plan.rules:
        specs = candidates(rule, plan.regime)
        assert len(set(specs)) == len(specs)
        assert len(plan.regime.caps[rule]) in (1, 3)
        configs = [Run(one, 0).config("unused") for one in specs]
        assert {config.learning_rate for config in configs} == set(plan.regime.learning_rates)
        own = Run(rule, 0).config("unused")
        assert configs[0].resolved_algorithm == own.resolved_algorithm
        assert [getattr(configs[0], f"vespo_{name}") for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")] == [
            2,
            3,
            3,
            2,
        ]


def test_ours_and_its_rivals_are_in_the_plan():
    assert {OURS, *RIVALS} <= set(STARTER.rules)
    assert {rule.split(":")[0] for rule in STARTER.rules} <= set(ALGORITHMS)
    assert len(PLANS["stale"]["long_tail"].rules) <= 6
    assert not set(SELECTION_SEEDS) & set(stale_plan.REPORT_SEEDS)


def test_parts_rules_and_conditions_can_be_dropped():
    parts = parts_of("stale", ["starter", "length"], ["grpo", "seq_tis"], lags=[0, 4], carry_overs=[])
    assert list(parts) == ["starter", "length"]
    assert parts["starter"].conditions == (Condition("starter"), Condition("starter", 4))
    assert parts["starter"].rules == ["seq_tis", "grpo"]
    assert parts["length"].rules == ["grpo"]
    assert parts["starter"].selection == STARTER.selection  # dropping conditions does not change what is chosen
    assert parts_of("stale") == PLANS["stale"]
    for selected, message in (
        ({"names": ["short"]}, "--parts short: choose from high_rate, length, long_tail, starter"),
        ({"rules": ["dapo"]}, "--algorithms dapo: choose from cispo"),
        ({"lags": [3]}, "--lags 3: choose from 0, 1, 2, 4"),
        ({"carry_overs": [7]}, "--carry_overs 7: choose from 0, 1, 2, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            parts_of("stale", **selected)


# The file of results


def test_lines_are_read_again_and_those_of_other_settings_are_not_used(tmp_path):
    run = Condition("starter", 2).run("grpo:epsilon_high=0.5", 1, 96, 24)
    path = tmp_path / "results.jsonl"
    file = write_lines(path, [line(run, [0.5] * 24)])
    assert file.get(run).measure("reward") == 0.5
    others = [replace(run, seed=2), replace(run, lag=0), replace(run, algorithm="grpo:epsilon_high=0.6")]
    assert file.missing([run, *others, run]) == others
    changed = line(run, [0.5] * 24)
    changed["settings"]["epsilon"] = 0.1  # as if the algorithm's default had been another one
    assert write_lines(path, [changed]).missing([run]) == [run]


@pytest.mark.parametrize(
    ("algorithm", "carry_over", "option", "value"),
    [
        ("tic_grpo_adaptive", 0, "gradient_noise_scale", 20.0),
        ("vcpo", 0, "baseline_norms", "tokens"),
        ("grpo", 2, "oversampling", 2.0),
    ],
)
def test_a_line_is_of_the_options_that_act_on_its_run(tmp_path, algorithm, carry_over, option, value):
    run = Condition("starter", carry_over=carry_over).run(algorithm, 0, 96, 24)
    assert {name: settings_of(run).get(name) for name in OPTIONS} == dict.fromkeys(OPTIONS) | {option: value}
    earlier = line(run, [0.5] * 24)
    del earlier["settings"][option]  # as if the default had been another one
    assert write_lines(tmp_path / "results.jsonl", [earlier]).missing([run]) == [run]
    named = replace(run, algorithm=f"{algorithm}:{option}={value}")
    assert option not in settings_of(named)  # the run's own fields have it


def test_measures_are_those_of_the_updates_that_all_conditions_have(tmp_path):
    run = Condition("starter", carry_over=2).run("grpo", 0, 144, 24)
    reward = [0.1] * 18 + [0.7] * 6 + [1.0] * 12  # 24 rollouts in 96 updates, then 12 more
    accuracy = {0: 0.3, 24: 0.4, 48: 0.5, 72: 0.6, 96: 0.7, 120: 0.8, 144: 0.9}
    result = StaleResult.of(line(run, reward, accuracy, engine_steps=[20] * 24 + [80] * 12))
    assert result.measure("reward") == pytest.approx((18 * 0.1 + 6 * 0.7) / 24)
    assert result.measure("final_reward") == pytest.approx(0.7)
    assert result.measure("accuracy") == 0.7
    assert result.measure("engine_steps") == 5  # 20 in every 4 updates


# Choosing


def test_settings_are_chosen_by_the_mean_over_lags_on_the_selection_seeds(tmp_path):
    part = small_part(RETUNED, "grpo")
    tis, grpo = (candidates(rule, part.regime) for rule in (RETUNED, "grpo"))
    rewards = {}
    for condition, spec, seed in product(part.selection, [*tis, *grpo], SELECTION_SEEDS):
        value = 0.4
        if spec == tis[1]:  # the best at lag 0, on average only the second
            value = {0: 0.8, 2: 0.3}[condition.lag]
        if spec == tis[2]:
            value = {0: 0.6, 2: 0.7}[condition.lag]
        rewards[condition.run(spec, seed, 64, 64)] = [value + 0.01 * seed / 100] * 16
    for condition in part.conditions:  # report seeds, which must not matter
        rewards[condition.run(tis[4], 0, 96, 24)] = [0.99] * 24
    file = write_lines(tmp_path / "results.jsonl", [line(run, reward) for run, reward in rewards.items()])
    outcome = Outcome.of(part, file, [0, 1])
    assert outcome.choice == {RETUNED: tis[2], "grpo": grpo[0]}
    assert outcome.retuned == {part.conditions[0]: tis[1], part.conditions[1]: tis[2]}
    specs = {condition: {run.algorithm for run in outcome.runs(condition, [0])} for condition in part.conditions}
    assert specs == {part.conditions[0]: {tis[1], tis[2], grpo[0]}, part.conditions[1]: {tis[2], grpo[0]}}
    # A rule whose grid is not complete has no choice yet.
    lacking = [line(run, reward) for run, reward in rewards.items() if run.algorithm != grpo[3]]
    assert list(Outcome.of(part, write_lines(tmp_path / "lacking.jsonl", lacking), [0]).choice) == [RETUNED]


# Curves over engine steps


def test_a_rollout_that_the_pool_already_holds_takes_no_steps(tmp_path):
    run = Condition("starter", carry_over=2).run("grpo", 0, 12, 12)
    logged = [{"carry_over/engine_steps": 5.0}, {}, {"carry_over/engine_steps": 7.0}]
    rollouts = [
        {"step": 1 + 4 * i, "reward": 0.5, "carry_over/pool_groups": 3.0} | each for i, each in enumerate(logged)
    ]
    history = [*rollouts, {"step": 12, "eval_reward": 0.5}]
    (tmp_path / "log_history.json").write_text(json.dumps(history))
    (tmp_path / "summary.json").write_text(json.dumps({"versions": {}, "seconds": 1.0}))
    assert stale_results.line_of(run, tmp_path)["engine_steps"] == [5, 0, 7]


def test_engine_steps_to_a_level():
    engine, values = [10.0, 20.0, 40.0], [0.2, 0.4, 0.8]
    assert steps_to(0.5, engine, values) == pytest.approx(25)  # a quarter of the way from 20 to 40
    assert steps_to(0.4, engine, values) == pytest.approx(20)
    assert steps_to(0.1, engine, values) == 10
    assert steps_to(0.9, engine, values) == math.inf


def test_engine_step_ratio():
    fresh, carried = Condition("starter"), Condition("starter", carry_over=2)
    accuracy = {0: 0.0, 24: 0.25, 48: 0.5, 72: 0.75, 96: 1.0}
    waiting = [StaleResult.of(line(fresh.run("grpo", s, 96, 24), [0.5] * 24, accuracy, [40] * 24)) for s in (0, 1)]
    slower = {step: 0.8 * value for step, value in accuracy.items()} | {120: 1.0, 144: 1.0}
    ours = [
        StaleResult.of(line(carried.run("grpo", s, 144, 24), [0.5] * 36, slower, engine_steps=[10] * 36))
        for s in (0, 1)
    ]
    assert list(mean_curve(waiting, "held-out accuracy")[0]) == [0, 240, 480, 720, 960]
    # 1.0 after 120 updates, which are 30 rollouts of 10 steps, against 24 rollouts of 40
    ratio = engine_step_ratio(ours, waiting, "held-out accuracy")
    assert ratio == pytest.approx((300 / 960, 300 / 960, 300 / 960))
    assert all(map(math.isnan, engine_step_ratio(ours[:1], waiting[1:], "held-out accuracy")))  # no seed in common
    never = [replace(result, line=result.line | {"accuracy": [[0, 0.0], [96, 0.9]]}) for result in ours]
    assert engine_step_ratio(never, waiting, "held-out accuracy") == (math.inf, math.inf, math.inf)


def test_t_interval():
    # mean 3, standard deviation √2.5, and Student's quantile of 4 degrees of freedom
    half = 2.776 * (2.5 / 5) ** 0.5
    assert t_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3 - half, 3 + half))
    assert t_interval([0.0, 2.0]) == pytest.approx((1 - 12.706, 1 + 12.706))
    for count in (1, 32):
        with pytest.raises(ValueError, match=f"{count} seeds: an interval by Student's distribution needs 2 to 31"):
            t_interval([*range(count)])


@pytest.mark.parametrize("degrees", range(1, 31))
def test_quantiles_of_student_s_distribution(degrees):
    """The density, integrated up to the quantile, leaves 2.5 % above it."""
    quantile = t_interval([-1.0] + [0.0] * (degrees - 1) + [1.0])[1] / stdev([-1.0] + [0.0] * (degrees - 1) + [1.0])
    quantile *= (degrees + 1) ** 0.5
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    t = np.linspace(0, quantile, 20_001)
    below = 0.5 + np.trapezoid(scale * (1 + t**2 / degrees) ** (-(degrees + 1) / 2), t)
    assert below == pytest.approx(0.975, abs=6e-5)  # as exact as three decimals of the quantile are


# Real runs


@pytest.fixture
def tiny_runs(monkeypatch):
    """Runs of eight updates of eight responses."""
    monkeypatch.setitem(stale_plan.STEPS, "starter", 8)
    monkeypatch.setattr(stale_plan, "EVAL_STEPS", 4)
    monkeypatch.setattr(stale_plan, "TEST_SIZE", 8)
    monkeypatch.setitem(SETTINGS, "num_generations", 4)
    monkeypatch.setitem(SETTINGS, "per_device_train_batch_size", 8)


def test_a_study_restarts_from_its_lines(tmp_path, tiny_runs, capsys):
    results = tmp_path / "committed" / "results.jsonl"

    def train(*conditions):
        part = replace(small_part("grpo", selection=False), conditions=conditions)
        assert Study({"starter": part}, [0], ResultsFile(results), tmp_path / "runs", 1).train() == []
        return [json.loads(text) for text in results.read_text().splitlines()], capsys.readouterr().out

    lagged, carried = Condition("starter", 1), Condition("starter", 0, 1)
    lines, budget = train(lagged)
    assert "lag 1" not in budget  # measured, so that nothing is left
    (first,) = lines
    assert (len(first["reward"]), len(first["engine_steps"])) == (2, 2)  # rollouts of four updates
    assert [step for step, _ in first["accuracy"]] == [0, 4, 8]
    assert set(first["by_age"]) == {"0", "1"}
    assert first["by_age"]["1"]["log_std"] > 0
    assert first["settings"]["epsilon_high"] == 0.28
    assert {"trl", "torch"} <= set(first["versions"])
    assert not list((tmp_path / "runs" / "runs").iterdir())  # all of a run is in its line

    lines, budget = train(lagged, carried)
    assert "starter, S = 1" in budget
    assert "lag 1" not in budget
    assert lines[0] == first
    assert [Condition.of(each["run"]) for each in lines] == [lagged, carried]
    assert len(lines[1]["reward"]) == 3
    assert train(lagged, carried)[0] == lines  # nothing is left


def test_a_stopped_run_with_a_lag_starts_again(tmp_path, tiny_runs):
    run = Condition("starter", 1).run("grpo", 0, 8, 8)
    checkpoint = tmp_path / "runs" / run.name / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 4}')  # resuming from it would fail
    assert len(stale_results.line_of(run, execute(run, tmp_path))["reward"]) == 2
    assert not checkpoint.exists()


def test_report_only_trains_nothing(tmp_path):
    report = study_stale("stale", tmp_path / "none.jsonl", tmp_path, ["--plan", "stale"])
    assert "no results" in report.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["stale.md"]
