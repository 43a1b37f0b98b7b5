"""Progress displays that show the reward and the effective sample size instead of every metric."""

from typing import Any

from transformers import ProgressCallback, TrainerCallback
from transformers.utils import is_in_notebook


SHOWN = {"reward": "reward", "trajectory_ratio/ess": "ess", "eval_reward": "eval_reward"}


def shown_values(logs: dict[str, float] | None) -> dict[str, str]:
    """What a display shows of a log entry, by its short name."""
    return {short: f"{logs[name]:.3f}" for name, short in SHOWN.items() if logs and logs.get(name) is not None}


class RewardProgressCallback(ProgressCallback):
    """The bar of [`~transformers.ProgressCallback`] with the latest reward, its held-out value and the effective sample
    size (share of n) behind it; the full set of metrics goes to the trackers and the log history."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._latest: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self._latest |= shown_values(logs)
            self.training_bar.set_postfix(self._latest, refresh=False)


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
            self._latest: dict[str, str] = {}
            self.training_tracker.inner_table = None

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_tracker is not None:
                self._latest |= shown_values(logs)

        def on_step_end(self, args, state, control, **kwargs):
            self._update(state.global_step, self._force_next_update)
            self._force_next_update = False

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            if self.training_tracker is None:  # `evaluate()` on its own
                super().on_evaluate(args, state, control, metrics, **kwargs)
                return
            values = {short: self._latest.get(short, "") for short in SHOWN.values()}
            self.training_tracker.write_line({"step": state.global_step} | values)
            self.training_tracker.remove_child()
            self.prediction_bar = None
            self._force_next_update = True

        def on_train_end(self, args, state, control, **kwargs):
            self._update(state.global_step, True)
            self.training_tracker = None

        def _update(self, step: int, force: bool):
            latest = ", ".join(f"{name}={value}" for name, value in self._latest.items())
            self.training_tracker.update(step, force_update=force, comment=latest)

    DISPLAYS[NotebookProgressCallback] = RewardNotebookCallback
