"""Show the reward and what became of the update in the progress bar, instead of every metric."""

from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import is_in_notebook

from ..rollout.schedule import RolloutSchedule


# Columns of a notebook's table
COLUMNS = ("reward", "ess", "eval_reward")
NUMBERS = {"reward": "reward", "ess": "trajectory_ratio/ess", "eval_reward": "eval_reward"}
PROBLEMS = {"skipped": "update/skipped", "non-finite": "frac_non_finite"}
# A narrow terminal leaves out the last ones
ORDER = ("reward", *PROBLEMS, "ess", "clipped", "eval_reward", "carried", "loss")
OF_ROLLOUT = ("reward", "carried")  # logged with its first update, and the same for the later ones
CLIP_SHARES = (("clip_high_pos",), ("clip_high_neg", "clip_low_neg"))  # for A > 0, for A < 0


def shown_values(logs: dict[str, float] | None) -> dict[str, str]:
    """Choose and format what the progress bar shows of a log entry, in order.

    `clipped` has the shares beyond a bound for A > 0 and for A < 0, – if no response has that sign. `carried` is the
    share of responses that earlier weights began. `skipped` and `non-finite` are left out if they are 0.
    """
    known = {name: value for name, value in (logs or {}).items() if value is not None}
    shares = [[known[path] for name in names if (path := f"trajectory_ratio/{name}") in known] for names in CLIP_SHARES]
    texts = {short: f"{known[name]:.3f}" for short, name in NUMBERS.items() if name in known}
    texts |= {short: f"{known[name]:.2g}" for short, name in PROBLEMS.items() if known.get(name)}
    if any(shares):
        texts["clipped"] = "/".join(f"{100 * sum(of_sign):.0f}%" if of_sign else "–" for of_sign in shares)
    if "carry_over/share" in known:
        texts["carried"] = f"{100 * known['carry_over/share']:.0f}%"
    if "loss" in known:
        texts["loss"] = f"{known['loss']:.2g}"
    return {name: texts[name] for name in ORDER if name in texts}


class LatestValues:
    """Keep what a display shows of the latest update and of the latest evaluation, and the step of each."""

    def __init__(self):
        self.update, self.update_step = {}, 0
        self.evaluation, self.evaluation_step = {}, 0

    def add(self, logs: dict[str, float] | None, step: int):
        """Take over the values of a log entry."""
        shown = shown_values(logs)
        if "eval_reward" in shown:
            self.evaluation, self.evaluation_step = {"eval_reward": shown.pop("eval_reward")}, step
        if shown:
            of_rollout = {name: text for name, text in self.update.items() if name in OF_ROLLOUT}
            self.update, self.update_step = of_rollout | shown, step

    def parts(self, step: int) -> list[str]:
        """Return the texts for a bar that stands at `step`: numbers of an earlier step have that step with them."""
        texts = {name: f"{name} {text}" for name, text in (self.update | self.evaluation).items()}
        if self.update and self.update_step != step:
            first = next(name for name in ORDER if name in self.update)
            texts[first] = f"step {self.update_step}: {texts[first]}"
        if self.evaluation and self.evaluation_step != (self.update_step if self.update else step):
            texts["eval_reward"] += f" (step {self.evaluation_step})"
        return [texts[name] for name in ORDER if name in texts]


def fitting(bar: tqdm, parts: list[str]) -> str:
    """Join as many of the first parts as the bar's line has room for, so that no number is cut off."""
    state = bar.format_dict
    for count in range(len(parts), 0, -1):
        text = ", ".join(parts[:count])
        line = bar.format_meter(**state | {"postfix": text, "ncols": None})
        # without a width the bar takes ten columns, but it needs only one
        if not state["ncols"] or len(line) - 9 <= state["ncols"]:
            return text
    return ""


class SettingsCallback(TrainerCallback):
    """Print the resolved settings when training starts, in a terminal or a notebook."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            settings = ", ".join(f"{name}={value}" for name, value in args.resolved_algorithm.items())
            updates = RolloutSchedule.of(args, args.world_size).updates
            first = f"TIC-GRPO settings in force: {settings}; K = {updates:g} updates per rollout"
            tqdm.write("\n".join([first, *args.notes]))


class RewardProgressCallback(ProgressCallback):
    """Show [`LatestValues`] behind the bar of [`~transformers.ProgressCallback`]."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._latest = LatestValues()

    def on_step_end(self, args, state, control, **kwargs):
        if not control.should_log:  # otherwise the values of this step are about to come
            self._draw(args, state, control)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            self._latest.add(logs, state.global_step)
            self._draw(args, state, control)
            self.training_bar.refresh()

    def _draw(self, args, state, control):
        if self.training_bar is not None:
            parts = self._latest.parts(state.global_step)
            self.training_bar.set_postfix_str(fitting(self.training_bar, parts), refresh=False)
        super().on_step_end(args, state, control)


# Our display for each of transformers'
DISPLAYS: dict[type[TrainerCallback], type[TrainerCallback]] = {ProgressCallback: RewardProgressCallback}

if is_in_notebook():  # IPython may not be installed elsewhere
    from transformers.utils.notebook import NotebookProgressCallback

    class RewardNotebookCallback(NotebookProgressCallback):
        """Show the same values in a notebook, and below the bar a table with one line per evaluation."""

        training_tracker: Any

        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            self._latest = LatestValues()
            self.training_tracker.inner_table = None  # its columns come with the first line

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_tracker is not None:
                self._latest.add(logs, state.global_step)
                self._draw(state)

        def on_step_end(self, args, state, control, **kwargs):
            if not control.should_log:
                self._draw(state)

        def _draw(self, state):
            text = ", ".join(self._latest.parts(state.global_step))
            self.training_tracker.update(state.global_step, force_update=True, comment=text)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            if self.training_tracker is None:  # evaluate() on its own
                super().on_evaluate(args, state, control, metrics, **kwargs)
                return
            update = self._latest.update if self._latest.update_step == state.global_step else {}
            values = update | self._latest.evaluation
            self.training_tracker.write_line(
                {"step": state.global_step} | {name: values.get(name, "") for name in COLUMNS}
            )
            self.training_tracker.remove_child()
            self.prediction_bar = None

        def on_train_end(self, args, state, control, **kwargs):
            self._draw(state)
            self.training_tracker = None

    DISPLAYS[NotebookProgressCallback] = RewardNotebookCallback


def replace_displays(trainer: Any):
    """Replace the displays that transformers has added to a trainer by ours."""
    for shown in [type(each) for each in trainer.callback_handler.callbacks if type(each) in DISPLAYS]:
        trainer.remove_callback(shown)
        trainer.add_callback(DISPLAYS[shown])
