"""A progress bar that shows the reward and the effective sample size instead of printing every metric."""

from transformers import ProgressCallback


SHOWN = {"reward": "reward", "trajectory_ratio/ess": "ess", "eval_reward": "eval_reward"}


class RewardProgressCallback(ProgressCallback):
    """The bar of [`~transformers.ProgressCallback`] with the latest reward, its held-out value and the effective sample
    size (share of n) behind it; the full set of metrics goes to the trackers and the log history."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._latest: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self._latest |= {short: f"{logs[name]:.3f}" for name, short in SHOWN.items() if logs.get(name) is not None}
            self.training_bar.set_postfix(self._latest, refresh=False)
