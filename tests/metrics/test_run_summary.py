"""Test the numbers from a log history and the figure drawn from them."""

import json

import matplotlib.pyplot as plt
import pytest
from conftest import CPU, make_trainer

from tic_grpo_trl import TICGRPOConfig
from tic_grpo_trl.metrics.run_summary import inner_steps, plot_curves, ratio_means, series, smooth, summarize_run


HISTORY = [
    {"step": 0, "eval_rewards/match/mean": 0.25},
    {"step": 1, "reward": 0.3, "completions/mean_length": 18.0, "trajectory_ratio/ess": 1.0},
    {"step": 2, "trajectory_ratio/ess": 0.9, "trajectory_ratio/clip_high_pos": 0.5, "reward": None},
    {"step": 2, "eval_rewards/match/mean": 0.75},
    {"step": 2, "train_runtime": 12.5},
]


def test_series_leaves_out_what_was_not_logged():
    assert series(HISTORY, "reward") == ([1], [0.3])
    assert series(HISTORY, "trajectory_ratio/ess") == ([1, 2], [1.0, 0.9])
    assert series(HISTORY, "nothing") == ([], [])


def test_smooth_averages_over_steps_not_points():
    assert smooth([1, 5, 9], [3.0, 5.0, 10.0], window=5) == pytest.approx([3.0, 4.0, 7.5])
    assert smooth([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0], window=2) == pytest.approx([1.0, 1.5, 2.5, 3.5])


def test_summary():
    args = TICGRPOConfig(output_dir="unused", algorithm="grpo2", seed=7, **CPU)
    summary = summarize_run(HISTORY, args, "match")
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.25, 0.75)
    assert (summary["updates"], summary["seconds"], summary["seed"]) == (2, 12.5, 7)
    assert (summary["algorithm"], summary["clip_mode"]) == ("grpo2", "up_only")
    assert summary["versions"]["trl"].startswith("1.16.")
    assert summary["ratios"] == pytest.approx({"ess": 0.95, "clip_high_pos": 0.5})
    assert json.loads(json.dumps(summary)) == summary
    without = summarize_run([entry for entry in HISTORY if "reward" in entry], args, "match")
    assert without["accuracy_before"] is None
    assert without["accuracy_after"] is None


def test_a_reward_of_zero_is_drawn_and_an_unused_bound_is_not(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    zeros = [{"step": step, "reward": 0.0, "trajectory_ratio/clip_low_neg": 0.0} for step in (1, 2)]
    plot_curves(zeros, tmp_path / "curves.png", "match")
    reward, clip = figures[-1].axes[0], figures[-1].axes[-1]
    assert [text.get_text() for text in reward.get_legend().get_texts()] == ["training reward"]
    assert clip.get_legend() is None


def test_figure_shows_every_curve(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    plot_curves(HISTORY, tmp_path / "curves.png", "match")
    pixels = plt.imread(tmp_path / "curves.png")
    assert pixels.shape[:2] == (1128, 1200)
    assert pixels[..., :3].std() > 0.05  # not an empty page
    (figure,) = figures
    shown = {text.get_text() for axis in figure.axes if axis.get_legend() for text in axis.get_legend().get_texts()}
    assert shown == {
        "training reward",
        "held-out accuracy",
        "mean response length",
        "effective sample size",
        "above the cap, A > 0",
    }
    assert all(axis.get_ylabel() for axis in figure.axes)


def of_inner_steps(updates: int, total: int):
    """A history as the trainer keeps it with one log per update: everything overall and under its inner step."""
    history = []
    for step in range(updates):
        k = step % total + 1
        values = {"ess": 1 - k / 100, "log_std": k / 10, "log_q05": -k / 5, "log_q50": 0.0, "log_q95": k / 20}
        values |= {"clip_high_pos": 0.1 * (k > 1), "clip_high_neg": 0.2, "clip_low_neg": 0.3}
        names = {f"trajectory_ratio/{place}{name}": v for name, v in values.items() for place in ("", f"inner_{k}/")}
        history.append({"step": step + 1, "frac_non_finite": 0.25 * (step == 0), "update/skipped": 0.0} | names)
    return history


def test_figure_and_summary_of_a_run_with_the_default_metrics(tmp_path, monkeypatch):
    """The first and the last inner step are drawn, and quantiles over all updates."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    settings = {"steps_per_generation": 4, "max_steps": 16, "log_all_ratio_metrics": False}
    trainer = make_trainer(tmp_path, **settings, skip_zero_advantage=False)
    trainer.train()
    history = trainer.state.log_history
    plot_curves(history, tmp_path / "curves.png", "count_a", window=1)
    _, _, ess, spread, quantiles, clip = figures[0].axes
    drawn = {axis: {line.get_label(): line for line in axis.get_lines()} for axis in figures[0].axes}
    assert [text.get_text() for text in ess.get_legend().get_texts()] == ["k = 4"]
    assert [text.get_text() for text in spread.get_legend().get_texts()] == ["k = 1 (noise floor)", "k = 4"]
    for axis, name in ((ess, "ess"), (spread, "log_std")):
        assert drawn[axis]["k = 4"].get_xdata().tolist() == [4, 8, 12, 16]
        values = [entry[f"trajectory_ratio/{name}"] for entry in history if entry["step"] % 4 == 0 and "loss" in entry]
        assert drawn[axis]["k = 4"].get_ydata().tolist() == values
    assert drawn[spread]["k = 1 (noise floor)"].get_ydata().tolist() == [0, 0, 0, 0]
    assert quantiles.get_ylabel() == "quantiles of R, nats"
    for label, name in (("5 %", "log_q05"), ("50 %", "log_q50"), ("95 %", "log_q95")):
        values = [entry[f"trajectory_ratio/{name}"] for entry in history if "loss" in entry]
        assert drawn[quantiles][label].get_ydata().tolist() == values
    assert {"above the cap, A > 0", "above the cap, A < 0"} <= set(drawn[clip])
    means = ratio_means(history)
    assert means["inner_4/ess"] == pytest.approx(sum(drawn[ess]["k = 4"].get_ydata()) / 4)
    assert means["log_q05"] == pytest.approx(sum(drawn[quantiles]["5 %"].get_ydata()) / 16)


def test_means_of_the_ratios_overall_and_by_inner_step():
    history = of_inner_steps(24, 12)
    history[0]["trajectory_ratio/noise_floor"] = 0.07
    history[5]["trajectory_ratio/inner_6/clip_high_pos"] = None  # no response with that sign
    assert inner_steps(history) == list(range(1, 13))  # in the order of numbers, not of names
    means = ratio_means(history)
    assert means["ess"] == pytest.approx(1 - 0.065)
    assert means["inner_12/ess"] == pytest.approx(0.88)
    assert means["inner_10/log_q05"] == pytest.approx(-2)
    assert (means["clip_high_neg"], means["clip_low_neg"]) == (pytest.approx(0.2), pytest.approx(0.3))
    assert (means["inner_1/clip_high_pos"], means["inner_6/clip_high_pos"]) == (0.0, pytest.approx(0.1))
    assert (means["noise_floor"], means["update/skipped"]) == (0.07, 0.0)
    assert means["frac_non_finite"] == pytest.approx(0.25 / 24)
    assert ratio_means([{"step": 1, "reward": 0.0}]) == {}
    carried = [{"step": 1, "carry_over/share": 0.2, "carry_over/mean_age": 0.3}, {"step": 2, "carry_over/share": 0.4}]
    carried[0]["trajectory_ratio/inner_1/age_0/log_std"] = 0.01
    expected = {"carry_over/share": 0.3, "carry_over/mean_age": 0.3, "inner_1/age_0/log_std": 0.01}
    assert ratio_means(carried) == pytest.approx(expected)


def test_with_carry_over_the_noise_floor_is_that_of_the_current_weights(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    waits, carries = ([entry | {"carry_over/share": share} for entry in of_inner_steps(8, 2)] for share in (0.0, 0.25))
    for entry in carries[::2]:
        entry["trajectory_ratio/inner_1/age_0/log_std"] = 0.01
    for history in (waits, carries):
        plot_curves(history, tmp_path / "curves.png", "match")
    labels = [[text.get_text() for text in figure.axes[3].get_legend().get_texts()] for figure in figures]
    assert labels == [["k = 1 (noise floor)", "k = 2"], ["k = 1", "k = 2", "k = 1, age 0 (noise floor)"]]


@pytest.mark.parametrize(("total", "lines"), [(2, [1, 2]), (4, [1, 2, 3, 4]), (16, [1, 6, 11, 16])])
def test_figure_shows_the_ratios_by_inner_step(tmp_path, monkeypatch, total, lines):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    history = of_inner_steps(48, total)
    history[0]["trajectory_ratio/noise_floor"] = 0.07
    plot_curves(history, tmp_path / "curves.png", "match", window=1)
    _, _, ess, spread, quantiles, clip = figures[0].axes
    drawn = {axis: {line.get_label(): line for line in axis.get_lines()} for axis in figures[0].axes}
    names = [f"k = {k}" for k in lines]
    assert [text.get_text() for text in ess.get_legend().get_texts()] == names
    noise = ["k = 1 (noise floor)", *names[1:], "measured at update 1: 0.07"]
    assert [text.get_text() for text in spread.get_legend().get_texts()] == noise
    for k, name in zip(lines, names, strict=True):
        line = drawn[ess][name]
        assert line.get_xdata().tolist() == list(range(k, 49, total))
        assert line.get_ydata().tolist() == pytest.approx([1 - k / 100] * (48 // total))
    assert drawn[spread][names[-1]].get_ydata().tolist() == pytest.approx([total / 10] * (48 // total))
    assert quantiles.get_ylabel() == f"quantiles of R at k = {total}, nats"
    for label, value in (("5 %", -total / 5), ("50 %", 0.0), ("95 %", total / 20)):
        assert drawn[quantiles][label].get_ydata().tolist() == pytest.approx([value] * (48 // total))
    assert {"above the cap, A > 0", "above the cap, A < 0", "below the lower bound, A < 0"} <= set(drawn[clip])
