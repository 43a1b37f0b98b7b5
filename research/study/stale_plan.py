"""The plan of the study of stale data, as data: rules, their grid of settings, conditions and runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .runs import Run
from .tables import Results
from .tuning import Regime, candidates, choose


# The rule of ours that the goal is about, named before the report seeds were run
OURS = "tic_grpo_adaptive"
RIVALS = ("grpo", "gspo", "cispo", "ctpo", "vespo", "seq_tis", "vcpo")  # that ours should be ahead of
RETUNED = "seq_tis"  # also with settings chosen for each condition, as a yardstick

_VESPO = "vespo_k_pos={},vespo_lambda_pos={},vespo_k_neg={},vespo_lambda_neg={}"
_NOISE_SCALES = tuple(f"gradient_noise_scale={scale}" for scale in (20.0, 5.0, 1.0))
# Three settings of each rule's bounds, its published default first
BOUNDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((OURS, f"{OURS}:importance_sampling_level=prefix"), _NOISE_SCALES),
    "seq_tis": ("epsilon_high=1.0", "epsilon_high=2.0", "epsilon_high=0.28"),
    "tic_grpo": ("epsilon_high=0.28", "epsilon_high=1.0", "epsilon_high=2.0"),
    "grpo": ("epsilon=0.2,epsilon_high=0.28", "epsilon=0.5,epsilon_high=1.0", "epsilon=0.8,epsilon_high=2.0"),
    "cispo": ("epsilon_high=5.0", "epsilon_high=2.0", "epsilon_high=10.0"),
    # its baseline with exact norms, as the models are small
    "vcpo": tuple(f"epsilon_high={cap},baseline_norms=gradients" for cap in (7.0, 3.0, 1.0)),
    "ctpo": tuple(
        f"length_scaled_floor={floor},length_scaled_cap={cap}"
        for floor, cap in ((0.025, 0.05), (0.223, 0.247), (0.3, 0.5))
    ),
    "gspo": tuple(f"epsilon={low},epsilon_high={high}" for low, high in ((3e-4, 4e-4), (0.01, 0.01), (0.03, 0.03))),
    # its weight w^k·e^(λ(1−w)) is the wider, the smaller k and λ are
    "vespo": tuple(_VESPO.format(*values) for values in ((2, 3, 3, 2), (1, 1.5, 1.5, 1), (0.5, 0.75, 0.75, 0.5))),
    "seq_mis": ("epsilon_high=2.0", "epsilon_high=4.0", "epsilon_high=1.0"),
    "grpo_no_is": ("",),
}
RATES = (1.5e-4, 3e-4)
HIGH_RATE = 6e-4  # at which many runs collapse
SELECTION_SEEDS = (100,)
REPORT_SEEDS = (0, 1, 2, 3, 4)
STEPS, K = {"starter": 96, "long_tail": 48}, 4  # by task; an update of the long tail takes six times as long
EVAL_STEPS, TEST_SIZE = 24, 200

# The claims of v5 on length: per-response 1/|o| against a constant (Theorem 4.1), UB_Clip against GRPO (Table 2)
_LENGTH_RULES = ("grpo", "grpo2", "grpo_traj_is", "tic_grpo", "tic_grpo:loss_type=grpo")
LENGTH_BOUNDS: dict[str, tuple[str, ...]] = dict.fromkeys(_LENGTH_RULES, ("",))
LENGTH_PAIRS = (("tic_grpo", "tic_grpo:loss_type=grpo"), ("grpo2", "grpo"), ("grpo2", "grpo_traj_is"))

SETTINGS: dict[str, Any] = {"behaviour_policy": "sampler", "save_strategy": "no"}


@dataclass(frozen=True, order=True)
class Condition:
    """How old the data of a run are.

    Args:
        task: key of [`~research.study.runs.TASKS`].
        lag: rollouts since the weights that sample.
        carry_over: `max_carry_over`, S; 0 waits for every response.
    """

    task: str
    lag: int = 0
    carry_over: int = 0

    @property
    def title(self) -> str:
        """Return its name in a report."""
        return f"{self.task}, S = {self.carry_over}" if self.carry_over else f"{self.task}, lag {self.lag}"

    @property
    def selection_steps(self) -> int:
        """Return the updates of a run that chooses settings."""
        return STEPS[self.task] * 2 // 3

    @property
    def report_steps(self) -> int:
        """Return the updates of a run to report. Carry-over's cost fewer engine steps, so its curves need more."""
        return STEPS[self.task] * 3 // 2 if self.carry_over else STEPS[self.task]

    def run(self, algorithm: str, seed: int, steps: int, eval_steps: int) -> Run:
        """Return a run of an algorithm's specification."""
        settings = SETTINGS | ({"max_carry_over": self.carry_over} if self.carry_over else {})
        pairs = tuple(sorted(settings.items()))
        return Run(algorithm, seed, steps, K, self.task, TEST_SIZE, eval_steps, pairs, self.lag)

    @classmethod
    def of(cls, run: dict[str, Any]) -> "Condition":
        """Return the condition of a run's fields."""
        return cls(run["task"], run.get("lag", 0), dict(run["settings"]).get("max_carry_over", 0))


@dataclass(frozen=True)
class Part:
    """A task and its rules, in some conditions, each rule with settings that are chosen on seeds of their own.

    Args:
        regime: its title, task, and grid of bounds and learning rates, which also names the rules.
        conditions: conditions to report.
        selection: conditions whose mean training reward chooses the settings. Without any, the first ones are used.
    """

    regime: Regime
    conditions: tuple[Condition, ...]
    selection: tuple[Condition, ...]

    @property
    def rules(self) -> list[str]:
        """List the rules."""
        return list(self.regime.caps)

    def candidates(self) -> list[str]:
        """List all settings of all rules, as specifications."""
        return [each for rule in self.rules for each in candidates(rule, self.regime)]

    def selection_runs(self) -> list[Run]:
        """List the runs that choose the settings. They are evaluated only at their end."""
        return [
            condition.run(candidate, seed, condition.selection_steps, condition.selection_steps)
            for condition in self.selection
            for candidate in self.candidates()
            for seed in SELECTION_SEEDS
        ]

    def choose(self, results: Results, rules: Sequence[str]) -> dict[str, str]:
        """Return each rule's specification: the best of the selection runs, on average over conditions and seeds."""
        if not self.selection:
            return {rule: candidates(rule, self.regime)[0] for rule in rules}
        return choose(results, rules, self.regime)

    def report_runs(self, condition: Condition, specs: Iterable[str], seeds: Iterable[int]) -> list[Run]:
        """List the runs of some specifications in a condition, seed by seed."""
        specs = list(specs)
        return [condition.run(each, seed, condition.report_steps, EVAL_STEPS) for seed in seeds for each in specs]


def _part(title: str, task: str, bounds: Mapping[str, tuple[str, ...]], conditions, selection, rates=RATES) -> Part:
    place = [tuple(Condition(task, *each) for each in some) for some in (conditions, selection)]
    return Part(Regime(title, task, rates, bounds), *place)


LONG_TAIL_RULES = ("tic_grpo_adaptive", "seq_tis", "grpo", "cispo", "vcpo", "gspo")
QUICK_RULES = ("tic_grpo_adaptive", "seq_tis", "grpo", "tic_grpo")

# (lag, S) of the conditions to report, and of those that choose the settings
PLANS: dict[str, dict[str, Part]] = {
    "stale": {
        "starter": _part(
            "The starter's task: responses of much the same length",
            "starter",
            BOUNDS,
            ((0, 0), (1, 0), (2, 0), (4, 0), (0, 1), (0, 2), (0, 3)),
            ((0, 0), (2, 0), (4, 0)),
        ),
        "high_rate": _part(
            "The same at twice the highest learning rate",
            "starter",
            BOUNDS,
            ((0, 0), (2, 0), (4, 0)),
            ((0, 0), (2, 0), (4, 0)),
            rates=(HIGH_RATE,),
        ),
        "long_tail": _part(
            "The task with a long tail of lengths",
            "long_tail",
            {rule: BOUNDS[rule] for rule in LONG_TAIL_RULES},
            ((0, 0), (2, 0), (0, 2)),
            ((2, 0),),  # its runs take six times as long
        ),
        "length": _part(
            "Length normalisation, on the task with a long tail",
            "long_tail",
            LENGTH_BOUNDS,
            ((0, 0),),
            ((0, 0),),
        ),
    },
    "stale_quick": {
        "starter": _part(
            "The starter's task: responses of much the same length",
            "starter",
            {rule: BOUNDS[rule] for rule in QUICK_RULES},
            ((0, 0), (2, 0), (0, 2)),
            (),
            rates=(3e-4,),
        )
    },
}
SEEDS = {"stale": REPORT_SEEDS, "stale_quick": (0, 1)}


def parts_of(
    plan: str,
    names: Sequence[str] | None = None,
    rules: Sequence[str] | None = None,
    lags: Sequence[int] | None = None,
    carry_overs: Sequence[int] | None = None,
) -> dict[str, Part]:
    """Return the parts of a plan without those, and without the rules and conditions, that are not asked for.

    Settings are always chosen in the same conditions, so that dropping some doesn't change them.

    Raises:
        ValueError: for a name that the plan does not have.
    """
    parts = PLANS[plan]
    _check("--parts", names, parts)
    _check("--algorithms", rules, {rule for part in parts.values() for rule in part.rules})
    conditions = [each for part in parts.values() for each in part.conditions]
    _check("--lags", lags, {each.lag for each in conditions})
    _check("--carry_overs", carry_overs, {each.carry_over for each in conditions})

    def is_wanted(condition: Condition) -> bool:
        if condition.carry_over:
            return carry_overs is None or condition.carry_over in carry_overs
        return lags is None or condition.lag in lags

    chosen = {}
    for name in names or parts:
        part = parts[name]
        caps = {rule: caps for rule, caps in part.regime.caps.items() if rules is None or rule in rules}
        wanted = tuple(condition for condition in part.conditions if is_wanted(condition))
        if caps and wanted:
            chosen[name] = replace(part, regime=replace(part.regime, caps=caps), conditions=wanted)
    return chosen


def _check(flag: str, given: Sequence[Any] | None, known: Iterable[Any]) -> None:
    unknown = set(given or ()) - set(known)
    if unknown:
        raise ValueError(
            f"{flag} {' '.join(map(str, sorted(unknown)))}: choose from {', '.join(map(str, sorted(known)))}."
        )
