"""report.py: numbers from a log history, and a figure that is really drawn."""

import matplotlib.pyplot as plt
import pytest
from conftest import CPU

from tic_grpo_trl import TICGRPOConfig
from tic_grpo_trl.report import plot_curves, series, smooth, summarize_run


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
    args = TICGRPOConfig(output_dir="unused", arm="grpo2", seed=7, **CPU)
    summary = summarize_run(HISTORY, args, "match")
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.25, 0.75)
    assert (summary["updates"], summary["seconds"], summary["seed"]) == (2, 12.5, 7)
    assert (summary["arm"], summary["clip_mode"]) == ("grpo2", "up_only")
    assert summary["versions"]["trl"].startswith("1.16.")
    without = summarize_run([entry for entry in HISTORY if "reward" in entry], args, "match")
    assert without["accuracy_before"] is None
    assert without["accuracy_after"] is None


def test_a_reward_of_zero_is_drawn_and_an_unused_bound_is_not(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    zeros = [{"step": step, "reward": 0.0, "trajectory_ratio/clip_low_neg": 0.0} for step in (1, 2)]
    plot_curves(zeros, tmp_path / "curves.png", "match")
    reward, clip = figures[0].axes[0], figures[0].axes[3]
    assert [text.get_text() for text in reward.get_legend().get_texts()] == ["training reward"]
    assert clip.get_legend() is None


def test_figure_shows_every_curve(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    plot_curves(HISTORY, tmp_path / "curves.png", "match")
    pixels = plt.imread(tmp_path / "curves.png")
    assert pixels.shape[:2] == (768, 1200)
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
