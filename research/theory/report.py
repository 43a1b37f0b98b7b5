"""The theory report as Markdown: numbers from [`Results`](experiments.py), no sentence without its number."""

import platform
from importlib.metadata import version

import torch

from tic_grpo_trl.metrics.run_summary import table

from .ascent import Ascent, slope
from .carry_over_report import carry_over_finding, carry_over_section
from .decomposition import CORRECTIONS, IDENTITIES
from .efficiency_report import efficiency_finding, efficiency_section
from .experiments import Results
from .figures import ASCENT_STYLES
from .reporting import number


def _exactness(results: Results) -> str:
    rows = [[c.claim, f"{c.value:.1e}", f"{c.target:.0e}", "yes" if c.holds else "**no**"] for c in results.checks]
    return table(["claim", "worst residual", "target", "holds"], rows)


def _biases(results: Results, clipped: bool, quantity: str, drifts: list[float]) -> str:
    rows = []
    for name, by_clip in results.biases.items():
        cells = []
        for drift in drifts:
            values = [getattr(b, quantity) for b in by_clip[clipped][results.scale.drifts.index(drift)]]
            cells.append(number(sum(values) / len(values)))
        rows.append([f"`{name}`", *cells])
    return table(["algorithm", *(f"drift {d:g}" for d in drifts)], rows)


def _groups(results: Results) -> str:
    sizes = results.scale.group_sizes
    rows = [
        [f"`{name}`", *(f"{number(by[size][0])} / {number(by[size][1])}" for size in sizes)]
        for name, by in results.groups.items()
    ]
    return table(["algorithm", *(f"G = {size}" for size in sizes)], rows)


def _terms(results: Results, drift: float) -> str:
    at, names = results.scale.drifts.index(drift), ["policy gradient", "gradient error", "sampling error"]
    names += ["length error", "clip error"]
    rows = []
    for key, terms in results.terms.items():
        cells = [f"{number(terms[n][at][0])} / {number(terms[n][at][1])}" if n in terms else "–" for n in names]
        rows.append([IDENTITIES[key].name, *cells])
    return table(["identity", *names], rows)


def _martingale(results: Results) -> str:
    rows = [
        [name, number(m.of_sum), number(m.summed), f"{m.gap:+.1e}" if abs(m.gap) < 1e-3 else f"{m.gap:+.3f}"]
        for name, m in results.martingale.items()
    ]
    return table(["x_t = c_t·∇log π_θ(o_t)", "E‖Σ x_t‖²", "Σ E‖x_t‖²", "relative gap"], rows)


def _mini_batches(results: Results) -> str:
    names = list(next(iter(results.mini_batches.values())))
    rows = [[f"{rate:g}", *(number(by[name]) for name in names)] for rate, by in results.mini_batches.items()]
    return table(["first step η", *names], rows)


def _index_of(name: str) -> int:
    return list(ASCENT_STYLES).index(name)


def _mean_and_error(values: torch.Tensor) -> str:
    return f"{float(values.mean()):.2e} ± {float(values.std() / len(values) ** 0.5):.0e}"


def share_in_order(outcomes: list[Ascent], first: str, second: str) -> float:
    """Share of runs (same task, same random numbers) in which the gap of `first` is larger than that of `second`.

    Ties up to rounding are left out (K = 1 makes GRPO2 and TIC-GRPO the same algorithm); nan where there is nothing
    else.
    """
    ahead = torch.cat([o.gap[_index_of(first)] / o.gap[_index_of(second)] - 1 for o in outcomes])
    ahead = ahead[ahead.abs() > 1e-9]
    decided = len(ahead)
    return int((ahead > 0).sum()) / decided if decided else float("nan")


def _gaps(results: Results, key: str, symbol: str) -> str:
    algorithms = list(ASCENT_STYLES)
    rows = []
    for x, outcome in results.ascents[key]:
        gaps = [_mean_and_error(outcome.gap[index]) for index in range(len(algorithms))]
        order = [("GRPO (1/|o|)", "GRPO2"), ("GRPO (DAPO)", "GRPO2"), ("GRPO2", "TIC-GRPO")]
        order.append(("GRPO2", "TIC-GRPO, no clip"))
        shares = [share_in_order([outcome], *pair) for pair in order]
        rows.append([f"{x:g}", *gaps, *("tie" if share != share else f"{share:.0%}" for share in shares)])
    header = [symbol, *algorithms, "GRPO (1/|o|) > GRPO2", "GRPO (DAPO) > GRPO2", "GRPO2 > TIC-GRPO", "GRPO2 > no clip"]
    return table([name.replace("|", "\\|") for name in header], rows)


def _slopes(results: Results) -> str:
    rows = []
    for key, points in results.ascents.items():
        mean, spread = slope([x for x, _ in points], torch.stack([outcome.gap for _, outcome in points]))
        rows.append([key, *(f"{float(m):+.2f} ± {float(s):.2f}" for m, s in zip(mean, spread, strict=True))])
    return table(["gap against", *(name.replace("|", "\\|") for name in ASCENT_STYLES)], rows)


def _outcomes(results: Results, key: str) -> str:
    rows = []
    for x, outcome in results.ascents[key]:
        cells = [
            f"{float(g.mean()):.3f}, {float(c.mean()):.1%}" for g, c in zip(outcome.gain, outcome.clipped, strict=True)
        ]
        rows.append([f"{x:g}", *cells])
    return table([key.split(",")[0], *(name.replace("|", "\\|") for name in ASCENT_STYLES)], rows)


def _averaged(results: Results, name: str, clipped: bool, drift: float, quantity: str = "direction_error") -> float:
    values = [getattr(b, quantity) for b in results.biases[name][clipped][results.scale.drifts.index(drift)]]
    return sum(values) / len(values)


def _findings(results: Results) -> str:
    """What came out against what the papers say; the wording follows the numbers."""
    drift = 0.1 if 0.1 in results.scale.drifts else results.scale.drifts[1]
    own = {n: _averaged(results, n, True, drift) for n in ("tic_grpo", "tic_grpo_capped", "grpo2", "grpo")}
    spread = results.spreads[results.scale.drifts.index(drift)][0]
    clip_costs = own["tic_grpo"] > own["grpo2"]

    def overall(first, second, sweeps=tuple(results.ascents)):
        outcomes = [outcome for key in sweeps for _, outcome in results.ascents[key]]
        return f"{share_in_order(outcomes, first, second):.0%}"

    def slopes(key, *algorithms):
        points = results.ascents[key]
        mean, spread = slope([x for x, _ in points], torch.stack([outcome.gap for _, outcome in points]))
        return ", ".join(f"{mean[_index_of(a)]:+.2f} ± {spread[_index_of(a)]:.2f} ({a})" for a in algorithms)

    matched, equal = ("T, matched step", "K", "η/T", "G"), ("T, equal η",)
    response, dapo, tic, unclipped = "GRPO (1/|o|)", "GRPO (DAPO)", "TIC-GRPO", "TIC-GRPO, no clip"
    token, capped = results.martingale["token weights"], results.martingale["token weights, up-only"]
    own_scores, trajectory = results.martingale["scores, own measure"], results.martingale["trajectory weight, up-only"]
    printed = [value for _, value in results.residuals.values() if value == value]
    widest = max(results.growth)
    growth = {
        name: float(slope(list(results.scale.horizons), cases[..., 0])[0])
        for name, cases in results.growth[widest].items()
    }
    lines = [
        f"**Exact claims.** {sum(c.holds for c in results.checks)} of {len(results.checks)} hold (section 1): "
        "unclipped TIC-GRPO gives ∇J(θ) whatever the drift, "
        "which no other level does (section 2); the five decompositions, once corrected; Property 4.1; Lemma A.1.",
        f"**The clip {'costs' if clip_costs else 'does not cost'} TIC-GRPO its advantage at moderate drift.** With "
        f"1+ε_high = 1.28 on both, at drift {drift:g} (standard deviation of R: {spread:.2f} nats) the direction error "
        f"is {own['tic_grpo']:.3f} for `tic_grpo`, {own['grpo2']:.3f} for `grpo2` and {own['grpo']:.3f} for `grpo`: R "
        'sums over the response, so the same cap is reached at a smaller drift. "Unbiased" is a statement about the '
        "update without its clip. Most of that is the gradient that the clip stops, not the weight that it bounds: "
        f"held at the same cap with its gradient kept (`tic_grpo_capped`), the error is {own['tic_grpo_capped']:.3f}.",
        "**The group mean shrinks the update.** A response is in its own group mean, so the exact expectation is "
        "(G−1)/G of the i.i.d. form for a clip that does not look at the sign of A and a constant normaliser (section "
        "3). v2 calls this a sampling error that vanishes; it is a known factor. With a sign-dependent clip, the "
        "group's std or DAPO's denominator it is more than a factor.",
        "**v5 §4.4: the clip, not the weight.** It says that token-wise weighting breaks the martingale structure. "
        "Alone it does not: Σ_a π_old·w·∇log π_θ = Σ_a ∇π_θ = 0, and Property 4.1 carries over to "
        f"{abs(token.gap):.0e} (section 5). The token *clip* breaks it (gap {capped.gap:+.3f} there). Against T at "
        f"drift {widest:g}, the second moment per token grows like T^{growth['token weights']:+.2f} for token weights, "
        f"T^{growth['token weights, up-only']:+.2f} with their clip, T^{growth['trajectory weight, up-only']:+.2f} for "
        f"TIC-GRPO and T^{growth['trajectory weight']:+.2f} for TIC-GRPO without its clip: the cap is what makes the "
        "trajectory weight affordable. The bound E‖1[D]·w'·Σ g_t‖² ≤ (1+ε_high)·Σ E_θ‖g_t‖² holds "
        f"({trajectory.of_sum:.3f} ≤ {1.28 * own_scores.summed:.3f}).",
        "**v2's Eq. 7 and Eq. 11 are not identities as printed**: the median residual is at least "
        f"{min(printed):.2g} times the update. The corrections are in section 4.",
        "**GRPO against GRPO2.** With one η for all algorithms the gap of GRPO is larger than that of GRPO2 in "
        f"{overall(response, 'GRPO2', equal)} (1/|o|) and {overall(dapo, 'GRPO2', equal)} (DAPO) of the runs: 1/|o| ≥ "
        "1/T makes GRPO's steps longer, and over a fixed number of steps that outweighs its floors. With the first "
        f"step size matched it is larger in {overall(response, 'GRPO2', matched)} and "
        f"{overall(dapo, 'GRPO2', matched)}. The first is the theorem's GRPO, with its length error; section 7 shows "
        "at which T, K and η the second follows.",
        f"**GRPO2 against TIC-GRPO.** In {overall('GRPO2', tic)} of the runs with K > 1 the gap of GRPO2 is larger "
        "than that of TIC-GRPO, the order of Theorems 4.2 and 4.3; without TIC-GRPO's clip in "
        f"{overall('GRPO2', unclipped)}. Slope of the gap against T, matched: "
        f"{slopes('T, matched step', 'GRPO2', tic, unclipped)}; one η: "
        f"{slopes('T, equal η', 'GRPO2', tic, unclipped)}. "
        "A better dependence on T would be a smaller slope.",
        carry_over_finding(results.carry_over),
        efficiency_finding(results.efficiency),
    ]
    return "\n".join(f"- {line}" for line in lines)


def theory_report(results: Results) -> str:
    """The report.

    Args:
        results: of [`measure`](experiments.py).

    Returns:
        Markdown that refers to the figures by file name.
    """
    scale = results.scale
    shown = [d for d in (0.0, 0.05, 0.1, 0.3, 1.0, 2.0) if d in scale.drifts]
    packages = ", ".join(f"{name} {version(name)}" for name in ("tic-grpo-trl", "trl", "torch"))
    spreads = ", ".join(
        f"{d:g}: {sd:.2f} ({largest:.1f})" for d, (sd, largest) in zip(scale.drifts, results.spreads, strict=True)
    )
    corrections = "\n".join(f"- *{where}*: {what}." for where, what in CORRECTIONS)
    printed = ", ".join(
        f"{IDENTITIES[key].name} {value:.2g}" for key, (_, value) in results.residuals.items() if value == value
    )
    return f"""# The theory, exactly

`make theory` wrote this page and its figures (Python {platform.python_version()}, {packages}, float64, CPU, one
thread). Policies are tabular softmax with a stop token; every one of {results.trajectories:,} trajectories is listed
({scale.prompts} prompts, {scale.vocabulary} tokens with the stop token, T = {scale.horizon}, one row of logits per last
token and per prompt's first position), so expectations are sums, not samples. Weights and clips are those that the
trainer uses (`tic_grpo_trl.objective`). Drift is the root mean square change of a logit between π_old and π_θ, in a
random direction; curves are means over {scale.policies} tasks with their own rewards, π_old and direction, bands span
them. Standard deviation of R under π_old, and in brackets the largest R of any trajectory, by drift: {spreads}. The
package holds every weight at e^20, which is out of reach.

## Findings

{_findings(results)}

## 1. Exact claims

{_exactness(results)}

Worst case over all drifts and tasks. Residuals of identities are relative to the largest vector in them, for every
sampled group of 8 responses.

## 2. Bias of each algorithm's update

Expectation in the papers' i.i.d. form: true mean (and standard deviation) of the reward in the advantage, E|o| in
DAPO's denominator. c is the constant that the normalisers are known to contribute (1/T, 1/E|o| or E[1/|o|], over E[σ]
where rewards are scaled). Relative error ‖u/c − ∇J(θ)‖/‖∇J(θ)‖, bounds out of reach:

{_biases(results, False, "relative_error", shown)}

Direction error (the smallest relative error that any step size can reach), with the algorithm's own clip:

{_biases(results, True, "direction_error", shown)}

![Bias against drift](bias.png)

Rows that are not 0 at drift 0 are biased by a σ per prompt (`tic_grpo_released`) and by 1/|o_i| as
well (`tic_grpo_v2`, `gspo`): they maximise something else than J.

## 3. Groups instead of true means

Every multiset of G responses of a task with 31 trajectories, at drift 0.2, own clip; group mean, group standard
deviation (divisor G − 1 and δ = 1e-4, as the trainer) and DAPO's Σ|o_i| of the group. First number: distance of the
exact expectation from (G−1)/G times the i.i.d. form; second: from the i.i.d. form; both relative to its norm.

{_groups(results)}

## 4. The decompositions, term by term

v2 Eq. 7 and Eq. 11 are whole in the source; v5's formulas (A.1–A.3) are lost and rebuilt from its prose. Corrections
that the printed identities need:

{corrections}

Residual of the equations exactly as printed, relative to the update (smallest over drifts of the median over groups):
{printed}. As corrected: section 1.

Size of the terms at drift 0.3, exact over all groups of {scale.group_sizes[-1]} responses of the 31-trajectory
task, in units of c/σ, in which the leading term has expectation ∇J: E‖term‖ / ‖E term‖.

{_terms(results, 0.3)}

![Error terms](terms.png)

The sampling error's expectation contains the (G−1)/G of section 3. The figure stacks E‖term‖.

## 5. Property 4.1 and v5 §4.4

Complete list of the first task, drift 0.3. Rows of logits are tied over positions: with a row per prefix the
property would be empty. The advantage is left out, as in the paper.

{_martingale(results)}

![Second moments against T](moments.png)

E‖Σ_t x_t‖² per token against T, {scale.samples:,} sampled responses per point, mean and range over
{len(scale.tasks)} tasks, E|o| growing in proportion to T. Flat is linear growth of the second moment; a rising line is
the extra factor of T that §4.4 speaks of. The uncapped trajectory weight is heavy-tailed: a sample understates it.

## 6. Lemma A.1

Two prompts, groups of two, unclipped TIC-GRPO, all rollouts listed. Relative bias of the *second* mini-batch's update
against (G−1)/G·E[∇J(θ_1)]:

{_mini_batches(results)}

"Through the groups" is what shuffling responses does; "reuse" is v2's Algorithm 2.

## 7. The order of Theorems 4.1–4.3

Vanilla gradient ascent from one start per task on {len(scale.tasks)} tasks whose value depends on the context in which
a response stops (0 if it does not stop by T); {scale.seeds} seeds each, {scale.ascent_steps} inner steps, 4 prompts per
mini-batch, G = 8 and K = 4 unless varied, random numbers shared by the algorithms. Responses are sampled; ‖∇J(θ_n,k)‖²
is exact at every T, by dynamic programming. GRPO (1/|o|) is the theorem's, GRPO (DAPO) the package's algorithm `grpo`;
GRPO2 and TIC-GRPO have the constant 1/T; "no clip" is TIC-GRPO without its bound. Gaps are means of ‖∇J‖² over all
inner and outer steps, ± standard error over runs; the last columns count the runs in which the order of the theorems
holds.

One learning rate for every algorithm and T (η = 32):

{_gaps(results, "T, equal η", "T")}

η = 2T, and GRPO's η divided so that all algorithms start with the same expected step size:

{_gaps(results, "T, matched step", "T")}

Inner steps K at T = {scale.ascent_horizon}, the same number of steps and mini-batch size for every K, matched:

{_gaps(results, "K", "K")}

Learning rate, as η/T:

{_gaps(results, "η/T", "η/T")}

Group size:

{_gaps(results, "G", "G")}

Slope of log gap against log abscissa, mean ± standard deviation over runs:

{_slopes(results)}

Gain of J over the run and share of tokens without gradient (matched step, against K, then η/T):

{_outcomes(results, "K")}

{_outcomes(results, "η/T")}

![Stationarity gap](stationarity.png)

Read with care: the theorems bound the gap from above for long runs with a step size that they choose; these are short
runs at given step sizes, where the gap is mostly the time that a run needs. Matching the mean normaliser does not match
the norm of the update. Runs share {len(scale.tasks)} tasks, so errors over runs understate the spread over tasks. A
policy that turns deterministic has a vanishing ∇J whether or not its J is good: compare the gains too.

{carry_over_section(results.carry_over)}
{efficiency_section(results.efficiency)}
"""
