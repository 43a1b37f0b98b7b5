"""Tables, tuning, figures and reports of the study on made-up results with hand-computed answers."""

import json
from dataclasses import asdict

import matplotlib.pyplot as plt
import pytest

from research.compared import COMPARED
from research.study.figures import plot_causes, plot_comparison, plot_inner_steps, plot_published
from research.study.report import report_comparison, report_tuned, verdicts
from research.study.runs import Run
from research.study.tables import (
    Result,
    bootstrap_interval,
    comparison_table,
    label,
    load,
    paired_differences,
    ratio_table,
)
from research.study.tuning import CAPS, REGIMES, candidates, choose, grid_table, spec


def result(algorithm, seed, rewards, accuracy=0.5, task="starter", **ratios):
    """A run of 4 updates per reward (K = 4), with constant ratios."""
    run = asdict(Run(algorithm, seed, steps=4 * len(rewards), task=task))
    history = [{"step": 0, "eval_rewards/exact_match_reward/mean": 0.3}]
    for i, reward in enumerate(rewards):
        history.append({"step": 4 * i + 1, "reward": reward})
        for k in range(1, 5):
            own = {f"trajectory_ratio/{name}": value for name, value in ratios.items()}
            own |= {f"trajectory_ratio/inner_{k}/{name}": value * k for name, value in ratios.items()}
            history.append({"step": 4 * i + k} | own)
    history.append({"step": run["steps"], "eval_rewards/exact_match_reward/mean": accuracy})
    return Result(algorithm, seed, run, {"accuracy_after": accuracy}, history)


def results_of(**rewards):
    """Results by algorithm from mean rewards by seed."""
    return {
        algorithm: [result(algorithm, seed, [value], value) for seed, value in enumerate(values)]
        for algorithm, values in rewards.items()
    }


def test_measures():
    run = result("grpo", 0, [0.1] * 4 + [0.5] * 8, accuracy=0.75)  # 48 updates, the last 32 at 0.5
    assert run.measure("accuracy") == 0.75
    assert run.measure("reward") == pytest.approx((4 * 0.1 + 8 * 0.5) / 12)
    assert run.measure("final_reward") == pytest.approx(0.5)


def test_differences_are_paired_by_seed():
    algorithm = [result("a", seed, [value]) for seed, value in ((0, 0.5), (2, 0.9), (3, 0.1))]
    baseline = [result("grpo", seed, [value]) for seed, value in ((2, 0.4), (1, 0.0), (0, 0.6))]
    assert paired_differences(algorithm, baseline, "reward") == pytest.approx([-0.1, 0.5])


def test_bootstrap_interval():
    assert bootstrap_interval([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))
    # Of two values every resample's mean is 0 (1/4), 1/2 (1/2) or 1 (1/4): both tails hold more than 2.5 %.
    assert bootstrap_interval([0.0, 1.0]) == pytest.approx((0.0, 1.0))
    low, high = bootstrap_interval([float(i % 2) for i in range(400)])  # binomial: 0.5 ± 1.96 · 0.5/√400
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.005)


def test_comparison_table():
    table = comparison_table(results_of(grpo=[0.4, 0.6], tic_grpo=[0.5, 0.9]), ["grpo", "missing", "tic_grpo"])
    lines = table.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| grpo | 2 | 50.0 ± 14.1 | ")
    assert lines[3].startswith("| tic_grpo | 2 | 70.0 ± 28.3 (+20.0, +10.0 to +30.0) | ")
    alone = comparison_table(results_of(tic_grpo=[0.5]), ["tic_grpo"])
    assert "| tic_grpo | 1 | 50.0 | 50.0 | 50.0 |" in alone
    single = comparison_table(results_of(grpo=[0.5], tic_grpo=[0.6]), ["tic_grpo"])
    assert "| 60.0 (+10.0) |" in single  # one seed has no interval


def test_verdicts_need_an_interval_without_zero():
    results = results_of(grpo=[0.5, 0.5], gspo=[0.4, 0.45], grpo2=[0.7, 0.4], tic_grpo=[0.6, 0.55], tic_grpo_v2=[0.9])
    assert verdicts(results).splitlines() == [
        "- ahead of `grpo`: tic_grpo (+7.5)",
        "- about equal to `grpo`: grpo2 (+5.0)",
        "- behind `grpo`: gspo (-7.5)",
    ]


def test_ratio_table_averages_over_updates_and_seeds():
    results = {"tic_grpo": [result("tic_grpo", s, [0.5], ess=0.8 + 0.1 * s, clip_high_neg=0.02) for s in (0, 1)]}
    assert "| tic_grpo | – | 0.850 | – | 2.0 | – |" in ratio_table(results, ["tic_grpo"])


def test_runs_are_loaded_by_algorithm_in_the_order_of_their_seeds(tmp_path):
    folders = []
    for algorithm, seed in (("tic_grpo:delta=3", 1), ("grpo", 0), ("tic_grpo:delta=3", 0)):
        one = result(algorithm, seed, [0.5])
        folder = tmp_path / f"{algorithm.split(':')[0]}{seed}"
        folder.mkdir()
        for name, content in (("run", one.run), ("summary", one.summary), ("log_history", one.history)):
            (folder / f"{name}.json").write_text(json.dumps(content))
        folders.append(folder)
    loaded = load(folders)
    assert list(loaded) == ["tic_grpo:delta=3", "grpo"]
    assert [run.seed for run in loaded["tic_grpo:delta=3"]] == [0, 1]
    assert label("tic_grpo:epsilon=0.2,delta=3") == "tic_grpo, ε 0.2, delta 3"


def test_every_algorithm_is_in_the_grid_with_valid_settings():
    assert {algorithm.split(":")[0] for algorithm in CAPS} == set(COMPARED)
    for regime in REGIMES.values():
        sizes = set()
        for algorithm in CAPS:
            specs = candidates(algorithm, regime)
            assert len(set(specs)) == len(specs)
            rates = {Run(one, 0).config("unused").learning_rate for one in specs}
            assert rates == set(regime.learning_rates)
            sizes.add(len(specs))
        # the same number of settings for each algorithm, but for the one that has nothing to clip
        assert sizes == {2 * len(regime.learning_rates), len(regime.learning_rates)}
    assert spec("tic_grpo:delta=3", "epsilon_high=1.0") == "tic_grpo:delta=3,epsilon_high=1.0"


def grid(regime, winner):
    specs = [one for algorithm in CAPS for one in candidates(algorithm, regime)]
    return {
        one: [result(one, seed, [0.9 if one in winner else 0.5], task=regime.task, ess=0.9) for seed in (0, 1)]
        for one in specs
    }


def test_each_algorithm_gets_its_best_settings():
    regime = REGIMES["high_drift"]
    winner = "tic_grpo:epsilon_high=1.0,learning_rate=0.0006"
    results = grid(regime, [winner])
    best = choose(results, list(CAPS), regime)
    assert best["tic_grpo"] == winner
    assert best["gspo"] == candidates("gspo", regime)[0]
    row = next(
        line for line in grid_table(results, list(CAPS), regime).splitlines() if "| tic_grpo | ε_high 1.0 |" in line
    )
    assert row == "| tic_grpo | ε_high 1.0 | 50.0 | **90.0** | 50.0 |"


def test_reports_and_their_figures(tmp_path):
    results = {
        algorithm: [result(algorithm, seed, [0.3, 0.5], 0.6, ess=0.9, clip_high_pos=0.1) for seed in (0, 1)]
        for algorithm in ("grpo", "grpo2", "grpo_traj_is", "gspo", "grpo_no_is", "tic_grpo")
    }
    report = report_comparison(results, tmp_path, "full", ["--steps", "8"]).read_text()
    for figure in ("table1", "table2", "fig1", "algorithms", "causes", "inner", "published"):
        assert f"(full_{figure}.png)" in report
        assert plt.imread(tmp_path / f"full_{figure}.png")[..., :3].std() > 0.02  # not an empty page
    assert "`python -m research.study --steps 8`" in report
    assert "trl 1.16" in report
    assert "github.com/pangleipll" in report


def test_report_compares_with_grpo_at_changed_settings(tmp_path):
    results = {
        algorithm: [result(algorithm, s, [v], v) for s in (0, 1)]
        for algorithm, v in (("tic_grpo", 0.6), ("grpo:delta=3", 0.5))
    }
    report = report_comparison(results, tmp_path, "k16", []).read_text()
    assert "difference from `grpo, delta 3`" in report
    assert "| tic_grpo | 2 | 60.0 ± 0.0 (+10.0, +10.0 to +10.0) |" in report
    assert "- ahead of `grpo, delta 3`: tic_grpo (+10.0)" in report


def test_tuned_report_compares_with_the_baseline_at_its_best(tmp_path):
    grids = {name: grid(regime, []) for name, regime in REGIMES.items()}
    finals = {}
    for name, regime in REGIMES.items():
        best = choose(grids[name], list(CAPS), regime)
        finals[name] = {
            one: [result(one, s, [0.5 if algorithm == "grpo" else 0.6], task=regime.task, ess=0.9) for s in (0, 1)]
            for algorithm, one in best.items()
        }
    report = report_tuned(grids, finals, list(CAPS), tmp_path, "tuned", []).read_text()
    assert report.count("(+10.0, +10.0 to +10.0)") == 2 * 2 * (len(CAPS) - 1)  # regimes x reward measures x algorithms
    assert len(list(tmp_path.glob("tuned_*.png"))) == 2 * 4
    assert all(f"({path.name})" in report for path in tmp_path.glob("*.png"))


def test_curves_are_means_with_a_band_over_the_seeds(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    results = {"grpo": [result("grpo", 0, [0.2, 0.2]), result("grpo", 1, [0.6, 0.6])]}
    plot_comparison(results, ["grpo", "tic_grpo"], tmp_path / "a.png")
    axis = figures[0].axes[1]
    assert axis.lines[0].get_ydata() == pytest.approx([0.4, 0.4])
    assert sorted(set(axis.collections[0].get_paths()[0].vertices[:, 1].round(6))) == [0.2, 0.6]
    plot_causes(
        {"grpo": [result("grpo", 0, [0.2], log_std=0.1), result("grpo", 1, [0.4], log_std=0.3)]}, tmp_path / "b.png"
    )
    assert figures[1].axes[1].lines[-1].get_xdata() == pytest.approx([0.2])
    plot_inner_steps(
        {"grpo": [result("grpo", 0, [0.2], ess=0.1), result("grpo", 1, [0.2], ess=0.3)]}, tmp_path / "c.png"
    )
    assert figures[2].axes[0].lines[0].get_ydata() == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_published_curves(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    (tmp_path / "a.csv").write_text("step,gspo,tic_grpo\n1,0.1,0.2\n2,0.3,0.4\n3,,0.6\n")
    plot_published(tmp_path / "a.csv", tmp_path / "a.png")
    lines = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[0].lines}
    assert lines["gspo"] == pytest.approx([0.1, 0.2])
    assert lines["tic_grpo"] == pytest.approx([0.2, 0.3, 0.4])
