"""A fair comparison: every algorithm at its own best settings, chosen on seeds that the comparison does not use."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from .runs import Run
from .tables import Results, label, short


# Two widths of cap per algorithm: as published, and wider by the factor that the algorithm's own scale allows.
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
    # not an algorithm: the trajectory ratio with PPO's rule and the constant normaliser
    "tic_grpo:clip_mode=two_sided": ("epsilon=0.2,epsilon_high=0.28", "epsilon=0.5,epsilon_high=1.0"),
}


@dataclass(frozen=True)
class Regime:
    """Where algorithms are compared.

    Args:
        title: for the report.
        task: key of [`~research.study.runs.TASKS`].
        learning_rates: the grid, the same for every algorithm.
    """

    title: str
    task: str
    learning_rates: tuple[float, ...]


REGIMES = {
    "small_drift": Regime("Small drift: low rate, longer responses", "long", (1e-4, 2e-4)),
    "high_drift": Regime("High drift: high rate, short responses", "starter", (3e-4, 6e-4, 1.2e-3)),
}
SELECTION_SEEDS = (100,)
REPORT_SEEDS = (0, 1, 2, 3, 4)
STEPS = 48  # updates per run: where the curves are steepest


def spec(algorithm: str, *settings: str) -> str:
    """An algorithm's specification with more settings: `spec("tic_grpo", "delta=3")` gives `"tic_grpo:delta=3"`."""
    name, _, own = algorithm.partition(":")
    settings = tuple(text for text in (own, *settings) if text)
    return f"{name}:{','.join(settings)}" if settings else name


def candidates(algorithm: str, regime: Regime) -> list[str]:
    """Every setting of an algorithm in the grid: learning rates times caps."""
    return [
        spec(algorithm, caps, f"learning_rate={rate:g}") for rate in regime.learning_rates for caps in CAPS[algorithm]
    ]


def lines_of(algorithm: str, regime: Regime) -> dict[str, list[str]]:
    """An algorithm's part of the grid by width of the cap, one specification per learning rate."""
    rates = [f"learning_rate={rate:g}" for rate in regime.learning_rates]
    return {
        name: [spec(algorithm, caps, rate) for rate in rates]
        for name, caps in zip(("cap as published", "wide cap"), CAPS[algorithm], strict=False)
    }


def make_runs(specs: Iterable[str], seeds: Iterable[int], regime: Regime, k: int, test_size: int) -> list[Run]:
    """Runs of a regime, evaluated at their end; every algorithm gets its first seed before any gets its second."""
    specs = list(specs)
    return [
        Run(algorithm, seed, STEPS, k, regime.task, test_size, eval_steps=STEPS)
        for seed in seeds
        for algorithm in specs
    ]


def choose(results: Results, algorithms: Sequence[str], regime: Regime) -> dict[str, str]:
    """Each algorithm's specification with the highest training reward, mean over the run and the selection seeds.

    The mean over the run is the least noisy measure there is (a few thousand responses), and it values speed and
    stability both.
    """

    def score(candidate: str) -> float:
        return fmean(result.measure("reward") for result in results[candidate])

    return {algorithm: max(candidates(algorithm, regime), key=score) for algorithm in algorithms}


def grid_table(results: Results, algorithms: Sequence[str], regime: Regime) -> str:
    """A markdown table of the selection: mean training reward over the run in points, best of each row in bold."""
    rates = [f"{rate:g}" for rate in regime.learning_rates]
    lines = [f"| algorithm | cap | {' | '.join(f'lr {rate}' for rate in rates)} |", "|---|---|" + "---|" * len(rates)]
    best = choose(results, algorithms, regime)
    for algorithm in algorithms:
        for caps in CAPS[algorithm]:
            cells = []
            for rate in rates:
                candidate = spec(algorithm, caps, f"learning_rate={rate}")
                value = f"{100 * fmean(result.measure('reward') for result in results[candidate]):.1f}"
                cells.append(f"**{value}**" if candidate == best[algorithm] else value)
            lines.append(f"| {label(algorithm)} | {short(caps) or '–'} | {' | '.join(cells)} |")
    return "\n".join(lines)
