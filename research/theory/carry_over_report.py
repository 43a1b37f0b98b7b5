"""The section of the report on carry-over: numbers from [`CarryOver`](carry_over.py)."""

from tic_grpo_trl.metrics.run_summary import table

from .carry_over import CONSTANT, CarryOver
from .release import Engine
from .reporting import number


def _shown(drifts) -> float:
    return 0.1 if 0.1 in drifts else list(drifts)[1]


def _mixtures(found: CarryOver, drift: float) -> str:
    rows = []
    for name, by_drift in found.mixtures.items():
        each = by_drift[drift]
        rows.append([name, f"{each.carried:.0%}", number(each.worst_expectation), *map(number, each.errors.values())])
    ratios = list(next(iter(found.mixtures.values()))[drift].errors)
    return table(["interrupted", "carried over", "E[w·f]", *(f"to {name}" for name in ratios)], rows)


def _group_means(found: CarryOver, drifts: list[float]) -> str:
    rows = []
    for (size, ended), by_drift in found.group_means.items():
        when = "each on its own" if ended is None else f"when {ended} of {size} {'has' if ended == 1 else 'have'} ended"
        rows.append([str(size), when, *(number(by_drift[d].added) for d in drifts)])
    return table(["G", "members are interrupted", *(f"drift {d:g}" for d in drifts)], rows)


def _engine(engine: Engine) -> list[str]:
    oversampling = engine.oversampling if engine.max_carry_over else 1.0
    return [str(engine.prompts), str(engine.group_size), str(engine.max_carry_over), f"{oversampling:g}"]


def updates_shown(rollouts: int) -> list[int]:
    """Numbers of the updates in the tables, from 1: the first ones, a few later ones, and the last."""
    return [n for n in (1, 2, 3, 4, 6, 8, 10) if n < rollouts] + [rollouts]


def _releases(found: CarryOver) -> str:
    rows, shown = [], updates_shown(found.rollouts)
    for engine, each in found.releases.items():
        for baseline, biases in each.biases.items():
            slots = "all" if engine.slots >= engine.oversampling * engine.prompts * engine.group_size else engine.slots
            cells = ["0" if biases[n - 1] < 1e-12 else number(biases[n - 1]) for n in shown]
            rows.append([*_engine(engine), str(slots), baseline, *cells, number(each.of_the_run[baseline])])
    header = ["P", "G", "S", "O", "slots", "baseline", *(f"update {n}" for n in shown), "whole run"]
    return table(header, rows)


def _ages(found: CarryOver) -> str:
    engines = [engine for engine in found.releases if engine.prompts == 2]
    ages = sorted({age for engine in engines for age in found.releases[engine].by_age})
    rows = []
    for engine in engines:
        by_age = found.releases[engine].by_age
        cells = [f"{by_age[age][1]:.2f} ({by_age[age][0]:.1%})" if age in by_age else "–" for age in ages]
        rows.append([*_engine(engine)[2:], *cells])
    return table(["S", "O", *(f"age {age}" for age in ages)], rows)


def _moving(found: CarryOver) -> str:
    shown = updates_shown(len(next(iter(found.moving.values())).biases))
    rows = []
    for drift, run in found.moving.items():
        wrong = [number(run.errors[name]) for name in ("what was recorded", "the last version", "the first version")]
        rows.append([f"{drift:g}", *(number(run.biases[n - 1]) for n in shown), *wrong])
    header = ["drift per rollout", *(f"update {n}" for n in shown), "run: recorded", "run: last", "run: first"]
    return table(header, rows)


def _learning(found: CarryOver) -> str:
    rows = []
    for engine, by_rate in found.learning.items():
        rows.append([str(engine.max_carry_over), *(number(bias) for bias, _ in by_rate.values())])
    return table(["S", *(f"η = {rate:g}" for rate in next(iter(found.learning.values())))], rows)


def _run(found: CarryOver, max_carry_over: int):
    """The run of two prompts per rollout at `oversampling=2` (or without carry-over)."""
    engine = Engine(prompts=2, max_carry_over=max_carry_over)
    return found.releases[engine]


def carry_over_finding(found: CarryOver) -> str:
    """The section in a paragraph."""
    drift = _shown(found.moving)
    ratios = next(iter(found.mixtures.values()))[_shown(next(iter(found.mixtures.values())))].errors
    biases = _run(found, 2).biases[CONSTANT]
    learned = found.learning[Engine(max_carry_over=1)][1.0][0]
    return (
        "**Carry-over: the ratio is exact, a single update is not.** With what was recorded when each token was "
        f"sampled, responses of several versions give ∇J(θ) to {number(ratios['what was recorded'])}; with the last "
        f"version alone the error is {number(ratios['the last version'])} (section 8). But the first rollouts hold the "
        f"groups that are complete first: with S = 2 and O = 2 the bias of the first update is {number(biases[0])} of "
        f"‖∇J‖ and that of the third {number(biases[2])}. At a fixed policy later updates lose their bias, and that of "
        f"a whole run is {number(_run(found, 2).of_the_run[CONSTANT])}. If the policy moves, some of it stays: "
        f"{number(found.moving[drift].biases[-2])} in a single update after the start at a drift of {drift:g} per "
        f"rollout, and {number(learned)} in the mean of a run whose policy learns (η = 1)."
    )


def carry_over_section(found: CarryOver) -> str:
    """The section, as Markdown."""
    by_drift = next(iter(found.mixtures.values()))
    drift, drifts = _shown(by_drift), [d for d in (0.0, 0.05, 0.1, 0.3, 1.0, 2.0) if d in by_drift]
    lengths = [", ".join(f"{n:.2f}" for n in _run(found, s).mean_lengths[:4]) for s in (1, 2, 3)]
    moving_groups = ", ".join(f"{e.slots} slots: {number(run.group_mean)}" for e, run in found.moving_groups.items())
    moving_drift = max(found.moving)
    middle = len(found.moving[moving_drift].biases) - 1
    return f"""## 8. Carry-over

With `max_carry_over` = S > 0 a generation call ends before its longest responses do, and later calls go on with them.
This has two effects: a response has tokens of several versions of the policy, and a rollout holds the groups that are
complete first. Both are computed for the 31 trajectories of section 3 (E|o| = {found.mean_length:.2f}, at most 4
tokens), unless a table says otherwise.

### Responses of several versions

w is P_θ(o) over the product of the probabilities that were recorded when the tokens were sampled. Each version has
drifted from the one before, and the current policy once more from the last. "Carried over" is the share of the tokens
that the last version did not sample, "E[w·f]" the largest |E[w·f] − E_θ[f]| of any f between −1 and 1. The other
columns are relative errors of E[w·A·∇log P_θ] with a constant baseline: with the ratio to what was recorded, to the
last version, to the first, and to the mean of all versions' log-probabilities. Drift {drift:g}:

{_mixtures(found, drift)}

An interruption may depend on everything sampled so far, but not on what comes. If the second version took over only in
responses that will be longer than two tokens, the recorded probabilities of all responses would sum to
{found.foreseen:.2f} instead of 1 (drift {max(by_drift):g}): they would not be what the responses were sampled from.

### The group mean over members of different age

As long as the versions of the other members do not depend on response i, neither does the mean of their rewards, and
E[update] = (G−1)/G·∇J(θ), whatever versions wrote them. If the end of response i interrupts the others, their mean
reward m(L) depends on its length L. Carry-over then adds

−(G−1)/G · Σ_L m(L)·∇P_θ(|o| = L)

to the expected update. A leave-one-out baseline has the same term: it is G/(G−1) times the advantage with the group
mean. Size of the term, relative to (G−1)/G·‖∇J(θ)‖:

{_group_means(found, drifts)}

Under the release rule a group's members do not interrupt one another: whether generation goes on does not depend on a
group that is incomplete. They only share the slots. Where responses wait for one, the end of a member lets another
group start earlier. A run with one group of two per rollout (7 trajectories, S = 1, O = 2, drift 0.2 per rollout) shows
how little that is. Relative error of the mean of all its updates, over (G−1)/G, against ∇J(θ):
{moving_groups}. Four slots are enough for all responses.

### Which groups a rollout holds

Small engines with P prompts per rollout and `oversampling` = O, runs of {found.rollouts} rollouts, and a policy that
stays the same. The release rule is the package's own. Bias of an update: ‖E[update] − ∇J‖/‖∇J‖, with the true mean
reward as a constant baseline, or with the group mean after division by (G−1)/G.

{_releases(found)}

- **Start.** Short responses are complete first. The mean lengths of the first four rollouts with P = 2 and O = 2 are
  {lengths[0]} (S = 1), {lengths[1]} (S = 2) and {lengths[2]} (S = 3).
  The bias of the first update depends on how many groups are in flight (O), not on S.
- **Later**, as many long responses are completed per rollout as are begun. At a fixed policy the bias dies out.
- **End.** The last rollouts drain the pool and hold long responses.
- **Whole run.** Every group is trained on exactly once, so the biases cancel (last column).

Mean length of responses by age, in rollouts since their first token, and in brackets their share of the run (P = 2):

{_ages(found)}

![Carry-over](carry_over.png)

### A policy that moves

Single responses, S = 1, O = 2. The policy drifts from rollout to rollout along a given path; update k is taken at θ_k.
Bias of single updates, then the relative error of the mean of all updates, all taken at the last θ, with the ratio to
what was recorded, to the version of a response's last token, and to that of its first:

{_moving(found)}

Taken at one θ, all updates of a run together are exact. A single update at its own θ_k is not, even after the start:
update {middle} is off by {number(found.moving[0.0].biases[middle - 1])} without drift and by \
{number(found.moving[moving_drift].biases[middle - 1])} at a drift of {moving_drift:g}.

With a policy that follows its updates, θ_k depends on which groups were complete first, and so on the lengths of those
that were not. Three rollouts of one response (7 trajectories), every course of the run listed, gradient ascent with
learning rate η. Bias of the mean of the three updates, each against ∇J at its own θ_k, relative to ‖∇J‖ at the start:

{_learning(found)}

Without carry-over every update is unbiased at θ_k, whatever η is.

Read with care: at most four responses are in flight here, and a rollout holds one or two groups. The tables show which
biases there are and what they depend on, not how large they are with hundreds of responses in flight.
"""
