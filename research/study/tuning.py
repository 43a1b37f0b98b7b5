"""Compare every algorithm at its best settings, chosen on seeds that the comparison does not use."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from .runs import Run
from .tables import Results, label, short


# Two caps per algorithm: as published, and wider
CAPS: dict[str, tuple[str, ...]] = {
    "tic_grpo": ("epsilon_high=0.28", "epsilon_high=1.0"),
    "tic_grpo_released": ("length_scaled_cap=0.01", "length_scaled_cap=0.05"),
    "tic_grpo_capped": ("epsilon_high=0.28", "epsilon_high=1.0"),
    "tic_grpo_truncated": ("epsilon=0.2,epsilon_high=0.28", "epsilon=0.5,epsilon_high=1.0"),
    "tic_grpo_v2": ("epsilon_high=0.28", "epsilon_high=1.0"),
    "grpo": ("epsilon=0.2,epsilon_high=0.28", "epsilon=0.5,epsilon_high=1.0"),
    "grpo2": ("epsilon_high=0.28", "epsilon_high=1.0"),
    "grpo_traj_is": ("epsilon=0.2,epsilon_high=0.28", "epsilon=0.5,epsilon_high=1.0"),
    "gspo": ("epsilon=0.0003,epsilon_high=0.0004", "epsilon=0.01,epsilon_high=0.01"),
    "grpo_no_is": ("",),  # nothing to clip
    # not a named algorithm: the trajectory ratio with PPO's rule and the constant normalizer
    "tic_grpo:clip_mode=two_sided": ("epsilon=0.2,epsilon_high=0.28", "epsilon=0.5,epsilon_high=1.0"),
}


@dataclass(frozen=True)
class Regime:
    """A task and learning rates at which to compare algorithms.

    Args:
        title: title in the report.
        task: key of [`~research.study.runs.TASKS`].
        learning_rates: learning rates of the grid, the same for every algorithm.
        caps: bounds of the grid, by algorithm.
    """

    title: str
    task: str
    learning_rates: tuple[float, ...]
    caps: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: CAPS)


REGIMES = {
    "small_drift": Regime("Small drift: low rate, longer responses", "long", (1e-4, 2e-4)),
    "high_drift": Regime("High drift: high rate, short responses", "starter", (3e-4, 6e-4, 1.2e-3)),
}
SELECTION_SEEDS = (100,)
REPORT_SEEDS = (0, 1, 2, 3, 4)
STEPS = 48  # updates per run, where the curves are steepest


def spec(algorithm: str, *settings: str) -> str:
    """Add settings to an algorithm's specification: `spec("tic_grpo", "delta=3")` gives `"tic_grpo:delta=3"`."""
    name, _, own = algorithm.partition(":")
    settings = tuple(text for text in (own, *settings) if text)
    return f"{name}:{','.join(settings)}" if settings else name


def candidates(algorithm: str, regime: Regime) -> list[str]:
    """List all settings of an algorithm in the grid: learning rates times caps."""
    return [
        spec(algorithm, caps, f"learning_rate={rate:g}")
        for rate in regime.learning_rates
        for caps in regime.caps[algorithm]
    ]


def lines_of(algorithm: str, regime: Regime) -> dict[str, list[str]]:
    """Return an algorithm's specifications by width of the cap, one per learning rate."""
    rates = [f"learning_rate={rate:g}" for rate in regime.learning_rates]
    return {
        name: [spec(algorithm, caps, rate) for rate in rates]
        for name, caps in zip(("cap as published", "wide cap"), regime.caps[algorithm], strict=False)
    }


def make_runs(specs: Iterable[str], seeds: Iterable[int], regime: Regime, k: int, test_size: int) -> list[Run]:
    """List the runs of a regime, seed by seed. They are evaluated only at their end."""
    specs = list(specs)
    return [
        Run(algorithm, seed, STEPS, k, regime.task, test_size, eval_steps=STEPS)
        for seed in seeds
        for algorithm in specs
    ]


def choose(results: Results, algorithms: Sequence[str], regime: Regime) -> dict[str, str]:
    """Return each algorithm's specification with the highest mean training reward over the run and selection seeds.

    This mean is the least noisy measure (over a few thousand responses), and rewards both speed and stability.
    """

    def score(candidate: str) -> float:
        return fmean(result.measure("reward") for result in results[candidate])

    return {algorithm: max(candidates(algorithm, regime), key=score) for algorithm in algorithms}


def grid_table(results: Results, algorithms: Sequence[str], regime: Regime) -> str:
    """Format the selection as a Markdown table: mean training reward in points, the best of each algorithm in bold."""
    rates = [f"{rate:g}" for rate in regime.learning_rates]
    lines = [f"| algorithm | cap | {' | '.join(f'lr {rate}' for rate in rates)} |", "|---|---|" + "---|" * len(rates)]
    best = choose(results, algorithms, regime)
    for algorithm in algorithms:
        for caps in regime.caps[algorithm]:
            cells = []
            for rate in rates:
                candidate = spec(algorithm, caps, f"learning_rate={rate}")
                value = f"{100 * fmean(result.measure('reward') for result in results[candidate]):.1f}"
                cells.append(f"**{value}**" if candidate == best[algorithm] else value)
            lines.append(f"| {label(algorithm)} | {short(caps) or '–'} | {' | '.join(cells)} |")
    return "\n".join(lines)
