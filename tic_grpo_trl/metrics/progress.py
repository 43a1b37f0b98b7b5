"""Show the reward and the importance ratios in the progress bar, instead of every metric."""

from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import is_in_notebook

from ..rollout.schedule import RolloutSchedule
from .ratios import QUANTILES
from .run_summary import NOISE_FLOOR, inner_steps


# Columns of a notebook's table, by metric
COLUMNS = {"reward": "reward", "trajectory_ratio/ess": "ess", "eval_reward": "eval_reward"}
PROBLEMS = {"update/skipped": "skipped", "frac_non_finite": "non_finite"}
# In this order; a narrow terminal leaves out the last ones
ORDER = ("reward", "ess", "eval_reward", "skipped", "non_finite", "R", "clip", "noise", "k")
CLIP_SHARES = (("clip_high_pos",), ("clip_high_neg", "clip_low_neg"))  # for A > 0, for A < 0


def _nats(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 9.995 else f"{value:.2f}".replace("-0.00", "0.00")


def shown_values(logs: dict[str, float] | None, measures_noise: bool = False) -> dict[str, str]:
    """Choose and format what the progress bar shows of a log entry.

    `R` has the 5, 50 and 95 % quantiles in nats; `clip` the shares beyond a bound for A > 0 and for A < 0, – if no
    response has that sign; `noise` the spread of R between equal weights in nats, where it was measured; `k` the inner
    steps of this entry. `skipped` and `non_finite` are empty if they are 0.
    """
    known = {name: value for name, value in (logs or {}).items() if value is not None}
    ratios = {name.removeprefix("trajectory_ratio/"): value for name, value in known.items()}
    shown = {short: f"{known[name]:.3f}" for name, short in COLUMNS.items() if name in known}
    shown |= {short: f"{known[name]:.2g}" if known[name] else "" for name, short in PROBLEMS.items() if name in known}
    if all(name in ratios for name in QUANTILES):
        shown["R"] = "/".join(_nats(ratios[name]) for name in QUANTILES)
        shares = [[ratios[name] for name in names if name in ratios] for names in CLIP_SHARES]
        shown["clip"] = "/".join(f"{100 * sum(of_sign):.0f}" if of_sign else "–" for of_sign in shares) + "%"
    spread = known.get("trajectory_ratio/inner_1/log_std") if measures_noise else None
    if (noise := known.get(NOISE_FLOOR, spread)) is not None:
        shown["noise"] = f"{noise:.2g}"
    if steps := inner_steps([known]):
        shown["k"] = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"
    return shown


def _line(values: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def fitting(bar: tqdm, values: dict[str, str]) -> dict[str, str]:
    """Return as many of the first values as the bar's line has room for, so that no number is cut off."""
    state, shown = bar.format_dict, dict(values)
    while shown and state["ncols"]:
        line = bar.format_meter(**state | {"postfix": _line(shown), "ncols": None})
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
    """Keep the latest text of every value that a display shows, in order."""

    def __init__(self):
        super().__init__(dict.fromkeys(ORDER, ""))

    def add(self, logs: dict[str, float] | None, args: Any):
        self.update(shown_values(logs, not args.skip_on_policy_logps or args.behaviour_policy == "sampler"))

    def shown(self) -> dict[str, str]:
        return {name: value for name, value in self.items() if value}


class RewardProgressCallback(ProgressCallback):
    """Show the latest of [`shown_values`] behind the bar of [`~transformers.ProgressCallback`]."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._latest = _Latest()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            self._latest.add(logs, args)
            self.training_bar.set_postfix(fitting(self.training_bar, self._latest.shown()), refresh=False)


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
            self.training_tracker.update(state.global_step, force_update=True, comment=_line(self._latest.shown()))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            if self.training_tracker is None:  # evaluate() on its own
                super().on_evaluate(args, state, control, metrics, **kwargs)
                return
            values = {short: self._latest[short] for short in COLUMNS.values()}
            self.training_tracker.write_line({"step": state.global_step} | values)
            self.training_tracker.remove_child()
            self.prediction_bar = None

        def on_train_end(self, args, state, control, **kwargs):
            self.on_step_end(args, state, control)
            self.training_tracker = None

    DISPLAYS[NotebookProgressCallback] = RewardNotebookCallback
