"""Verdicts, tables and the report of the study of stale data, on made-up lines with hand-computed answers."""

from dataclasses import replace
from itertools import product

import matplotlib.pyplot as plt
import pytest
from stale_lines import line, write_lines

from research.study.stale import study_stale
from research.study.stale_outcome import Outcome
from research.study.stale_plan import OURS, PLANS, RETUNED, SELECTION_SEEDS, Condition, parts_of
from research.study.stale_report import report_stale
from research.study.stale_results import ResultsFile
from research.study.stale_tables import (
    age_ratio_table,
    ahead_verdict,
    engine_verdict,
    fresh_verdict,
    lag_ratio_table,
    length_table,
    retuned_verdict,
)
from research.study.tuning import candidates


RULES = (OURS, RETUNED, "grpo")
SEEDS = (0, 1)
FRESH, LAGGED, CARRIED = Condition("starter"), Condition("starter", 2), Condition("starter", carry_over=2)


def outcome_of(tmp_path, lines, conditions=(FRESH, LAGGED, CARRIED), name="starter", rules=RULES):
    """The outcome of a part that needs no choice, from lines of its runs."""
    part = parts_of("stale", [name], rules)[name]
    part = replace(part, conditions=conditions, selection=())
    return Outcome.of(part, write_lines(tmp_path / "results.jsonl", lines), SEEDS)


def chosen(rule, name="starter"):
    return candidates(rule, PLANS["stale"][name].regime)[0]


def runs_of(rewards, condition, name="starter", **more):
    """Lines of a condition from the mean reward of each rule and seed."""
    steps = condition.report_steps
    return [
        line(condition.run(chosen(rule, name), seed, steps, 24), [value] * (steps // 4), **more)
        for rule, values in rewards.items()
        for seed, value in zip(SEEDS, values, strict=False)
    ]


def test_ahead_needs_an_interval_without_zero(tmp_path):
    # Of two differences a and b, the interval is their mean ± 12.706·|a − b|/2.
    lines = runs_of({OURS: (0.6, 0.6), "grpo": (0.5, 0.501), RETUNED: (0.5, 0.58)}, LAGGED)
    text = ahead_verdict(outcome_of(tmp_path, lines))
    assert f"**does not hold: not ahead of `{RETUNED}` at lag 2**" in text
    assert "| `grpo` | +9.9, +9.3 to +10.6 |" in text  # 9.95 ± 0.635
    assert f"| `{RETUNED}` | +6.0, -44.8 to +56.8 |" in text  # 6 ± 50.8
    few = outcome_of(tmp_path / "few", runs_of({OURS: (0.6, 0.6), "grpo": (0.5, 0.501)}, LAGGED))
    assert "**holds for 1 of 7 comparisons, the others were not run**" in ahead_verdict(few)
    assert "**no results**" in ahead_verdict(outcome_of(tmp_path / "none", []))


def test_within_a_point_of_the_best_without_lag(tmp_path):
    lines = runs_of({OURS: (0.6, 0.6), "grpo": (0.608, 0.610)}, FRESH)
    assert "**holds** (best: `grpo`, 0.9 points ahead)" in fresh_verdict(outcome_of(tmp_path, lines))
    lines = runs_of({OURS: (0.6, 0.6), "grpo": (0.62, 0.61)}, FRESH)
    assert "**does not hold** (best: `grpo`, 1.5 points" in fresh_verdict(outcome_of(tmp_path / "worse", lines))


def test_level_with_the_retuned_rule(tmp_path):
    part = parts_of("stale", ["starter"], (OURS, RETUNED), lags=[0, 2], carry_overs=[])["starter"]
    part = replace(part, selection=part.conditions)
    best = {FRESH: candidates(RETUNED, part.regime)[1], LAGGED: candidates(RETUNED, part.regime)[2]}
    ours = candidates(OURS, part.regime)[0]
    lines = [
        line(condition.run(spec, seed, 64, 64), [0.5 if spec in (best[condition], ours) else 0.1] * 16)
        for condition, spec, seed in product(part.conditions, part.candidates(), SELECTION_SEEDS)
    ]

    def verdict(name, rewards, part=part):
        report = [
            line(condition.run(spec, seed, 96, 24), [value] * 24)
            for condition, theirs in zip((FRESH, LAGGED), rewards, strict=True)
            for seed in SEEDS
            for spec, value in ((ours, 0.6), (best[condition], theirs[seed]))
        ]
        return retuned_verdict(Outcome.of(part, write_lines(tmp_path / name / "results.jsonl", lines + report), SEEDS))

    # Intervals as in the first test
    text = verdict("wide", ((0.58, 0.62), (0.641, 0.643)))
    assert "- lag 0: **not told apart** (+0.0, -25.4 to +25.4; seq_tis, ε_high 2.0, lr 0.00015)" in text
    assert "- lag 2: **behind** (-4.2, -5.5 to -2.9; seq_tis, ε_high 0.28, lr 0.00015)" in text
    assert "1 run per setting" in text
    assert "without a retuned rule" not in text
    text = verdict("narrow", ((0.5985, 0.5995), (0.551, 0.549)))
    assert "- lag 0: **level** (+0.1, -0.5 to +0.7;" in text
    assert "- lag 2: **ahead** (+5.0, +3.7 to +6.3;" in text
    text = verdict("not chosen", ((0.6, 0.6), (0.5, 0.5)), replace(part, selection=(LAGGED,)))
    assert "- lag 0" not in text
    assert "without a retuned rule: lag 0." in text


def test_half_the_engine_steps(tmp_path):
    accuracy = {0: 0.0, 48: 0.5, 96: 1.0}
    lines = runs_of({OURS: (0.5, 0.5)}, FRESH, accuracy=accuracy, engine_steps=[40] * 24)
    # As accurate after as many updates, of 16 steps each instead of 40; the reward's level is there from the start.
    lines += runs_of({OURS: (0.5, 0.5)}, CARRIED, accuracy=accuracy, engine_steps=[16] * 36)
    text = engine_verdict(outcome_of(tmp_path, lines))
    assert "at most half the engine steps: **holds**." in text
    assert f"| {OURS}, κ 20.0, lr 0.00015 | 10.0 | 4.0 | – | 0.40 (0.40 to 0.40) | 0.40 (0.40 to 0.40) |" in text
    lines += runs_of({"grpo": (0.5, 0.5)}, FRESH) + runs_of({"grpo": (0.4, 0.4)}, CARRIED)
    assert "| not reached (not reached to not reached) |" in engine_verdict(outcome_of(tmp_path / "more", lines))


def test_held_out_accuracy_alone_decides_on_carry_over(tmp_path):
    waiting = runs_of({OURS: (0.5, 0.5)}, FRESH, accuracy={0: 0.0, 96: 1.0}, engine_steps=[40] * 24)
    # The reward's level is there at once, and the accuracy's only after 144 updates of 16 steps: 576 of 960.
    slow = {
        "accuracy": {0: 0.0, 96: 0.5, 144: 1.0},
        "engine_steps": [16] * 36,
        "carry_over/prefilled_again_per_token": 0.25,
    }
    text = engine_verdict(outcome_of(tmp_path, waiting + runs_of({OURS: (0.5, 0.5)}, CARRIED, **slow)))
    assert "at most half the engine steps: **does not hold**." in text
    assert "| 10.0 | 4.0 | 0.25 | 0.40 (0.40 to 0.40) | 0.60 (0.60 to 0.60) |" in text


def test_conditions_without_a_seed_in_common_have_no_ratio(tmp_path):
    lines = runs_of({OURS: (0.5,)}, FRESH)
    other = line(CARRIED.run(chosen(OURS), 1, 144, 24), [0.5] * 36)
    text = engine_verdict(outcome_of(tmp_path, [*lines, other]))
    assert "**no results**" in text
    assert "| 10.0 | 10.0 | – | – | – |" in text


def test_ratios_by_age(tmp_path):
    ages = {"0": {"ess": 0.98, "log_std": 0.1}, "2": {"ess": 0.7, "log_std": 0.6, "clip_high_pos": 0.05}}
    lines = runs_of({"grpo": (0.5, 0.5)}, LAGGED, by_age=ages) + runs_of({"grpo": (0.5, 0.5)}, CARRIED, by_age=ages)
    outcome = outcome_of(tmp_path, lines, rules=("grpo",))
    name = "| grpo, ε 0.2, ε_high 0.28, lr 0.00015 |"
    assert f"{name} 0.70 / 0.60 / 5.0 / – |" in lag_ratio_table(outcome)
    assert f"{name} 0.98 / 0.10 / – / – | – | 0.70 / 0.60 / 5.0 / – |" in age_ratio_table(outcome, CARRIED)


def test_claims_on_length(tmp_path):
    condition = Condition("long_tail")
    lines = runs_of({"tic_grpo": (0.6, 0.62), "tic_grpo:loss_type=grpo": (0.5, 0.52)}, condition, "length")
    rules = PLANS["stale"]["length"].rules
    text = length_table(outcome_of(tmp_path, lines, (condition,), "length", rules))
    assert "| `tic_grpo` minus `tic_grpo:loss_type=grpo` | +10.0, +10.0 to +10.0 | +10.0, +10.0 to +10.0 |" in text


def test_the_report_from_lines_alone(tmp_path):
    parts = parts_of("stale_quick", rules=(OURS, RETUNED, "grpo"))
    lines = []
    for condition, (rule, reward) in product(
        parts["starter"].conditions, {OURS: 0.6, RETUNED: 0.55, "grpo": 0.5}.items()
    ):
        steps = condition.report_steps
        spec = candidates(rule, parts["starter"].regime)[0]
        for seed in SEEDS:
            value = reward - 0.05 * condition.lag - 0.01 * seed
            accuracy = {0: 0.3, steps // 2: 0.5, 96: value, steps: value}
            lines.append(line(condition.run(spec, seed, steps, 24), [value] * (steps // 4), accuracy))
    write_lines(tmp_path / "results.jsonl", lines)
    report = study_stale("stale_quick", tmp_path / "results.jsonl", tmp_path, ["--plan", "stale_quick"]).read_text()
    for figure in ("lag", "engine_steps"):
        assert f"(stale_quick_{figure}.png)" in report
        assert plt.imread(tmp_path / f"stale_quick_{figure}.png")[..., :3].std() > 0.02  # not an empty page
    assert "Versions: torch 2.9.0, trl 1.16.0" in report or "Versions: trl 1.16.0, torch 2.9.0" in report
    assert f"| {OURS}, κ 20.0, lr 0.0003 | 2 | 49.5 ± 0.7 |" in report  # lag 2: 0.60 − 0.10, and a point less
    assert "| grpo, ε 0.2, ε_high 0.28, lr 0.0003 | 2 | 39.5 ± 0.7 (-10.0, -10.0 to -10.0) |" in report
    titles = [text for text in report.splitlines() if text.startswith("### ")]
    assert [title for title in titles if "lag" in title or "S =" in title] == [
        "### starter, lag 0",
        "### starter, lag 2",
        "### starter, S = 2",
    ]


def test_the_figure_of_lags_has_a_line_per_rule_and_ours_is_bold(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    lines = runs_of({OURS: (0.6, 0.7), "grpo": (0.5, 0.5)}, FRESH) + runs_of(
        {OURS: (0.5, 0.6), "grpo": (0.3, 0.3)}, LAGGED
    )
    outcome = outcome_of(tmp_path, lines)
    report_stale({"starter": outcome}, ResultsFile(tmp_path / "results.jsonl"), SEEDS, tmp_path, "mine", [])
    drawn = {text.get_label(): text for text in figures[0].axes[0].lines}
    assert list(drawn[OURS].get_ydata()) == pytest.approx([65, 55])
    assert list(drawn["grpo"].get_ydata()) == pytest.approx([50, 30])
    assert drawn[OURS].get_linewidth() > 2 * drawn["grpo"].get_linewidth()
