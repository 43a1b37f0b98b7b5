"""Show the reward and the importance ratios in the progress bar, instead of every metric."""

import re
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import is_in_notebook

from ..rollout.schedule import RolloutSchedule


# Columns of a notebook's table, by metric
COLUMNS = {"reward": "reward", "trajectory_ratio/ess": "ess", "eval_reward": "eval_reward"}
# In this order; a narrow terminal leaves out the last ones
ORDER = ("reward", "ess", "eval_reward", "skipped", "non_finite", "R", "clip", "noise", "k")
QUANTILES = [f"trajectory_ratio/log_q{level}" for level in ("05", "50", "95")]
CLIP_SHARES = (  # for A > 0, for A < 0
    ["trajectory_ratio/clip_high_pos"],
    ["trajectory_ratio/clip_high_neg", "trajectory_ratio/clip_low_neg"],
)
NOISE = ("trajectory_ratio/noise_floor", "trajectory_ratio/inner_1/log_std")


def _nats(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 9.995 else f"{value:.2f}".replace("-0.00", "0.00")


def shown_values(logs: dict[str, float] | None, measures_noise: bool = False) -> dict[str, str]:
    """Choose and format what the progress bar shows of a log entry.

    Args:
        logs: the entry.
        measures_noise: whether the spread of R at the first inner step is measured, rather than 0 by definition.

    Returns:
        Texts by name, if the entry has them: `reward`, `ess` (effective sample size, share of n) and `eval_reward`;
        `skipped` (share of updates) and `non_finite` (share of responses), empty if 0; `R`, its 5, 50 and 95 %
        quantiles in nats; `clip`, the shares beyond a bound for A > 0 and for A < 0 (– if no response has that sign);
        `noise`, the spread of R between equal weights in nats; `k`, the inner steps of this entry.
    """
    known = {name: value for name, value in (logs or {}).items() if value is not None}
    shown = {short: f"{known[name]:.3f}" for name, short in COLUMNS.items() if name in known}
    for name, short in (("update/skipped", "skipped"), ("frac_non_finite", "non_finite")):
        if name in known:
            shown[short] = f"{known[name]:.2g}" if known[name] else ""
    if all(name in known for name in QUANTILES):
        shown["R"] = "/".join(_nats(known[name]) for name in QUANTILES)
        shares = [[known[name] for name in names if name in known] for names in CLIP_SHARES]
        shown["clip"] = "/".join(f"{100 * sum(of_sign):.0f}" if of_sign else "–" for of_sign in shares) + "%"
    for name in NOISE if measures_noise else NOISE[:1]:
        if name in known:
            shown["noise"] = f"{known[name]:.2g}"
            break
    steps = [match[1] for name in known if (match := re.fullmatch(r"trajectory_ratio/inner_(\d+)/ess", name))]
    if steps:
        shown["k"] = steps[0] if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"
    return shown


def fitting(bar: tqdm, values: dict[str, str]) -> dict[str, str]:
    """Return as many of the first values as the bar's line has room for, so that no number is cut off."""
    state = bar.format_dict
    shown = dict(values)
    while shown and state["ncols"]:
        texts = ", ".join(f"{name}={value}" for name, value in shown.items())
        line = bar.format_meter(**state | {"postfix": texts, "ncols": None})
        if len(line) - 9 <= state["ncols"]:  # without a width the bar takes ten columns, but it needs only one
            break
        shown.popitem()
    return shown


class SettingsCallback(TrainerCallback):
    """Print the resolved settings when training starts, in a terminal or a notebook."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            settings = ", ".join(f"{name}={value}" for name, value in args.resolved_algorithm.items())
            updates = RolloutSchedule.of(args, args.world_size).updates
            first = f"TIC-GRPO settings in force: {settings}; K = {updates:g} updates per rollout"
            tqdm.write("\n".join([first, *args.notes]))


class _Latest(dict):
    """The latest text of every value that a display shows."""

    def add(self, logs: dict[str, float] | None, args):
        self |= shown_values(logs, not args.skip_on_policy_logps or args.behaviour_policy == "sampler")

    def in_order(self) -> dict[str, str]:
        return {name: self[name] for name in ORDER if self.get(name)}


class RewardProgressCallback(ProgressCallback):
    """Show the latest of [`shown_values`] behind the bar of [`~transformers.ProgressCallback`]."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._latest = _Latest()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            self._latest.add(logs, args)
            self.training_bar.set_postfix(fitting(self.training_bar, self._latest.in_order()), refresh=False)


# Our display for each of transformers'
DISPLAYS: dict[type[TrainerCallback], type[TrainerCallback]] = {ProgressCallback: RewardProgressCallback}

if is_in_notebook():  # IPython may not be installed elsewhere
    from transformers.utils.notebook import NotebookProgressCallback

    class RewardNotebookCallback(NotebookProgressCallback):
        """Show the same values in a notebook, and below the bar a table with one line per evaluation."""

        training_tracker: Any

        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            self._latest = _Latest()
            self.training_tracker.inner_table = None  # its columns come with the first line

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_tracker is not None:
                self._latest.add(logs, args)

        def on_step_end(self, args, state, control, **kwargs):
            latest = ", ".join(f"{name}={value}" for name, value in self._latest.in_order().items())
            self.training_tracker.update(state.global_step, force_update=True, comment=latest)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            if self.training_tracker is None:  # evaluate() on its own
                super().on_evaluate(args, state, control, metrics, **kwargs)
                return
            values = {short: self._latest.get(short, "") for short in COLUMNS.values()}
            self.training_tracker.write_line({"step": state.global_step} | values)
            self.training_tracker.remove_child()
            self.prediction_bar = None

        def on_train_end(self, args, state, control, **kwargs):
            self.on_step_end(args, state, control)
            self.training_tracker = None

    DISPLAYS[NotebookProgressCallback] = RewardNotebookCallback
