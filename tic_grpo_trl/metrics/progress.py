"""Progress displays with the reward and what warns of trouble, instead of every metric."""

import re
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import is_in_notebook

from ..rollout.schedule import RolloutSchedule


# What a notebook's table has a column for, by the metric's name
COLUMNS = {"reward": "reward", "trajectory_ratio/ess": "ess", "eval_reward": "eval_reward"}
# In the order of a line that may have to do without the last ones
ORDER = ("reward", "ess", "eval_reward", "skipped", "non_finite", "R", "clip", "noise", "k")
QUANTILES = [f"trajectory_ratio/log_q{level}" for level in ("05", "50", "95")]
CLIP_SHARES = (  # of A > 0, of A < 0
    ["trajectory_ratio/clip_high_pos"],
    ["trajectory_ratio/clip_high_neg", "trajectory_ratio/clip_low_neg"],
)
NOISE = ("trajectory_ratio/noise_floor", "trajectory_ratio/inner_1/log_std")


def _nats(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 9.995 else f"{value:.2f}".replace("-0.00", "0.00")


def shown_values(logs: dict[str, float] | None, measures_noise: bool = False) -> dict[str, str]:
    """What a display shows of a log entry.

    Args:
        logs: the entry.
        measures_noise: whether the spread of R at the first inner step is measured, and not 0 by definition.

    Returns:
        Texts by name, where the entry has them: `reward`, `ess` (effective sample size, share of n), `eval_reward`;
        `skipped` (share of updates) and `non_finite` (share of responses), empty where they are 0; `R`, its quantiles
        at 5, 50 and 95 % in nats; `clip`, the shares beyond a bound for A > 0 and for A < 0 (–: none has that sign);
        `noise`, the spread of R between equal weights in nats; `k`, the inner steps that all this is of.
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


class SettingsCallback(TrainerCallback):
    """Show the settings in force when training starts, in a terminal and in a notebook alike."""

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        settings = ", ".join(f"{name}={value}" for name, value in args.resolved_algorithm.items())
        updates = RolloutSchedule.of(args, args.world_size).updates
        lines = [f"TIC-GRPO settings in force: {settings}; K = {updates:g} updates per rollout", *args.notes]
        tqdm.write("\n".join(lines))


class _Latest:
    """The latest text of everything that is shown, in order."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def note(self, logs: dict[str, float] | None, args):
        measures_noise = not args.skip_on_policy_logps or args.behaviour_policy == "sampler"
        self.values |= shown_values(logs, measures_noise)

    def shown(self) -> dict[str, str]:
        return {name: self.values[name] for name in ORDER if self.values.get(name)}


def fitting(bar: tqdm, values: dict[str, str]) -> dict[str, str]:
    """The first of the values, as many as the bar's line has room for: a number that is cut off is another number."""
    state = bar.format_dict
    shown = dict(values)
    while shown and state["ncols"]:
        texts = ", ".join(f"{name}={value}" for name, value in shown.items())
        line = bar.format_meter(**state | {"postfix": texts, "ncols": None})
        if len(line) - 9 <= state["ncols"]:  # without a width the bar itself takes ten columns, of which it needs one
            break
        shown.popitem()
    return shown


class RewardProgressCallback(ProgressCallback):
    """The bar of [`~transformers.ProgressCallback`] with the latest values of [`shown_values`] behind it; the full set
    of metrics goes to the trackers and the log history."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._latest = _Latest()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self._latest.note(logs, args)
            self.training_bar.set_postfix(fitting(self.training_bar, self._latest.shown()), refresh=False)


# By the class that it replaces
DISPLAYS: dict[type[TrainerCallback], type[TrainerCallback]] = {ProgressCallback: RewardProgressCallback}

if is_in_notebook():  # elsewhere IPython may not be installed
    from transformers.utils.notebook import NotebookProgressCallback

    class RewardNotebookCallback(NotebookProgressCallback):
        """The same in a notebook, with a row for every evaluation below the bar. The parent's rows have a column for
        every metric of an evaluation, or none but the loss, which is about 0 whatever is learned."""

        training_tracker: Any
        _force_next_update: bool

        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            self._latest = _Latest()
            self.training_tracker.inner_table = None

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_tracker is not None:
                self._latest.note(logs, args)

        def on_step_end(self, args, state, control, **kwargs):
            self._update(state.global_step, self._force_next_update)
            self._force_next_update = False

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            if self.training_tracker is None:  # `evaluate()` on its own
                super().on_evaluate(args, state, control, metrics, **kwargs)
                return
            values = {short: self._latest.values.get(short, "") for short in COLUMNS.values()}
            self.training_tracker.write_line({"step": state.global_step} | values)
            self.training_tracker.remove_child()
            self.prediction_bar = None
            self._force_next_update = True

        def on_train_end(self, args, state, control, **kwargs):
            self._update(state.global_step, True)
            self.training_tracker = None

        def _update(self, step: int, force: bool):
            latest = ", ".join(f"{name}={value}" for name, value in self._latest.shown().items())
            self.training_tracker.update(step, force_update=force, comment=latest)

    DISPLAYS[NotebookProgressCallback] = RewardNotebookCallback
