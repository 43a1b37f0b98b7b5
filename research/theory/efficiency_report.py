"""The section of the report on rules for stale data: numbers from [`Efficiencies`](efficiency_grid.py)."""

from collections.abc import Callable

from tic_grpo_trl.metrics.run_summary import table

from .efficiency import NOISE_SCALE
from .efficiency_grid import CONSTANTS, NO_CAP, Cell, Efficiencies, mean


TARGET = 0.95
WIDE = 2.0  # nats
ON_DISTRIBUTION = "the rule, on the distribution"
OWN_NAMES = {"trajectory": "`tic_grpo_adaptive`", "prefix": "the same for prefixes"}


def on_sample(n: int) -> str:
    """Name of the row for a cap from n responses."""
    return f"the rule, on its own sample of {n}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def relative(cell: Cell, value: float, n: int, level: str = "trajectory") -> float:
    """η over that of the best constant cap in hindsight."""
    return value / cell.best(n, level)[1]


def _value(cell: Cell, name: str, n: int) -> float:
    if name in OWN_NAMES.values():
        level = next(level for level, own in OWN_NAMES.items() if own == name)
        return mean(cell.adaptive[level][n])
    return cell.efficiency(name, n)


def rule_names(found: Efficiencies) -> list[str]:
    """Every rule of the comparison, ours last."""
    return [*found.cells[0].rules, *OWN_NAMES.values()]


def compared(found: Efficiencies, name: str, drift: float, n: int, sampled: bool = False) -> float:
    """Mean over tasks and lengths of a rule's η over that of the best constant cap of the trajectory weight."""
    cells = [cell for cell in found.cells if cell.drift == drift and cell.sampled == sampled]
    return mean([relative(cell, _value(cell, name, n), n) for cell in cells])


def _shown(name: str) -> str:
    return name if " " in name or name.startswith("`") else f"`{name}`"


def _comparison(found: Efficiencies, sampled: bool) -> str:
    drifts, ns = found.size.drifts, found.size.ns
    rows = [
        [_shown(name), *(" / ".join(_percent(compared(found, name, d, n, sampled)) for n in ns) for d in drifts)]
        for name in rule_names(found)
    ]
    best = ["*η of the best cap*"]
    for drift in drifts:
        cells = [cell for cell in found.cells if cell.drift == drift and cell.sampled == sampled]
        best.append("*" + " / ".join(f"{mean([cell.best(n)[1] for cell in cells]):.2f}" for n in ns) + "*")
    return table(["rule", *(f"drift {drift:g}" for drift in drifts)], [*rows, best])


def _bias_and_noise(found: Efficiencies) -> str:
    rows = []
    for name in found.cells[0].rules:
        cells = []
        for drift in found.size.drifts:
            of_drift = [m for c in found.cells if c.drift == drift and not c.sampled for m in c.rules[name]]
            cells.append(f"{mean([m.bias for m in of_drift]):.2f} / {mean([m.variance for m in of_drift]):.0f}")
        rows.append([_shown(name), *cells])
    return table(["rule", *(f"drift {drift:g}" for drift in found.size.drifts)], rows)


def _cap(cap: float) -> str:
    return "none" if cap >= NO_CAP else f"{cap:.2g}"


def _best_caps(found: Efficiencies) -> str:
    ns = found.size.ns
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in found.cells:
        groups.setdefault((cell.kind.split(",")[0], cell.length), []).append(cell)
    rows = []
    for (kind, length), cells in groups.items():
        row = [kind, str(length)]
        for drift in found.size.drifts:
            of_drift = [cell for cell in cells if cell.drift == drift]
            pairs = []
            for n in ns:
                by_cap = {
                    cap: mean([mean(c.held["trajectory"][cap][n]) / c.best(n)[1] for c in of_drift])
                    for cap in of_drift[0].held["trajectory"]
                }
                pairs.append(_cap(max(by_cap, key=by_cap.__getitem__)))
            row.append(" / ".join(pairs) + f" ({mean([c.spread for c in of_drift]):.2g})")
        rows.append(row)
    return table(["parameters", "tokens", *(f"drift {drift:g}" for drift in found.size.drifts)], rows)


def nearness(
    found: Efficiencies, level: str, ns, value: Callable[[Cell, int], list[float]], where: Callable[[Cell], bool]
) -> tuple[float, float, float, float] | None:
    """Mean and worst cell, the worst single policy against its own best cap, and the share of cells at the target."""
    cells, policies = [], []
    for cell in filter(where, found.cells):
        for n in ns:
            values = value(cell, n)
            cells.append(mean(values) / cell.best(n, level)[1])
            for k, each in enumerate(values):
                policies.append(each / max(by_n[n][k] for by_n in cell.held[level].values()))
    if not cells:
        return None
    return mean(cells), min(cells), min(policies), mean([each >= TARGET for each in cells])


def rows_of_nearness(found: Efficiencies, level: str) -> dict[str, tuple[tuple[int, ...], Callable]]:
    """Return row -> (n, values of a cell) of the comparison with the best constant cap."""
    size = found.size
    rows: dict[str, tuple] = {
        ON_DISTRIBUTION: (size.ns, lambda c, n: c.adaptive[level][n]),
        **{on_sample(n): ((n,), lambda c, n: [each for each, _ in c.own_sample[level][n]]) for n in size.own_ns},
        **{f"constant {cap:g}": (size.ns, lambda c, n, cap=cap: c.held[level][cap][n]) for cap in CONSTANTS},
    }
    if level == "trajectory":
        rows["the first form"] = (size.ns, lambda c, n: c.first_form[n])
    return rows


def domains(found: Efficiencies) -> dict[str, Callable[[Cell], bool]]:
    """Return the parts of the grid that are reported apart."""
    last = max(found.size.drifts)
    return {
        f"listed, drift below {last:g}": lambda c: not c.sampled and c.drift < last,
        f"listed, drift {last:g}": lambda c: not c.sampled and c.drift == last,
        f"sampled, σ below {WIDE:g}": lambda c: c.sampled and c.spread < WIDE,
        f"sampled, σ above {WIDE:g}": lambda c: c.sampled and c.spread >= WIDE,
    }


def _nearness(found: Efficiencies, level: str) -> str:
    parts = domains(found)
    rows = []
    for name, (ns, value) in rows_of_nearness(found, level).items():
        row = [name]
        for where in parts.values():
            each = nearness(found, level, ns, value, where)
            row.append("{} / {} / {}".format(*map(_percent, each)) + f", {each[3]:.0%}" if each else "–")
        rows.append(row)
    return table(["cap", *parts], rows)


def _worst_cells(found: Efficiencies, count: int = 6) -> str:
    """The cells in which the rule is farthest from the best constant cap."""
    each = []
    for cell in found.cells:
        for n in found.size.ns:
            ratio = mean(cell.adaptive["trajectory"][n]) / cell.best(n)[1]
            each.append((ratio, cell, n))
    rows = []
    for ratio, cell, n in sorted(each, key=lambda found: found[0])[:count]:
        picked, own = cell.caps["trajectory"][n], cell.own_sample["trajectory"].get(n)
        singles = [
            value / max(by_n[n][k] for by_n in cell.held["trajectory"].values())
            for k, value in enumerate(cell.adaptive["trajectory"][n])
        ]
        rows.append(
            [
                cell.kind,
                str(cell.length),
                f"{cell.drift:g} ({cell.spread:.1f})",
                str(n),
                _cap(cell.best(n)[0]),
                f"{min(picked):.2g} to {max(picked):.2g}",
                f"{min(cell.noise_scale):.0f} to {max(cell.noise_scale):.0f}",
                _percent(ratio),
                _percent(min(singles)),
                _percent(mean([value for value, _ in own]) / cell.best(n)[1]) if own else "–",
            ]
        )
    header = ["task", "tokens", "drift (σ)", "n", "best cap", "the rule's", "κ", "%", "worst policy", "own sample"]
    return table(header, rows)


def _sampled(found: Efficiencies) -> str:
    """η of some rules on the sampled tasks, with standard errors, at the middle n."""
    n = found.size.ns[len(found.size.ns) // 2]
    names = ("grpo_no_is", "grpo", "cispo", "tic_grpo", "seq_tis", "vcpo", "trajectory, no cap")
    rows = []
    for cell in (cell for cell in found.cells if cell.sampled):
        row = [str(cell.length), f"{cell.drift:g} ({cell.spread:.1f})"]
        for name in names:
            error = (
                mean([each.standard_error(n) ** 2 for each in cell.rules[name]]) ** 0.5 / len(cell.noise_scale) ** 0.5
            )
            row.append(f"{cell.efficiency(name, n):.3f} ± {error:.3f}")
        rows.append([*row, *(f"{mean(cell.adaptive[level][n]):.3f}" for level in OWN_NAMES)])
    return table(["tokens", "drift (σ)", *map(_shown, names), *OWN_NAMES.values()], rows)


def efficiency_findings(found: Efficiencies) -> list[str]:
    """Three findings; the wording follows the numbers."""
    size, listed = found.size, [cell for cell in found.cells if not cell.sampled]
    first, last, small, large = size.drifts[0], size.drifts[-1], size.ns[0], size.ns[-1]
    wide = [cell for cell in found.cells if cell.sampled and cell.drift == last]

    def middle_cap(drift: float, n: int) -> str:
        caps = sorted(cell.best(n)[0] for cell in listed if cell.drift == drift)
        return _cap(caps[len(caps) // 2])

    def rule(row: str) -> tuple[str, bool]:
        ns, value = rows_of_nearness(found, "trajectory")[row]
        parts = {name: nearness(found, "trajectory", ns, value, where) for name, where in domains(found).items()}
        known = {name: each for name, each in parts.items() if each}
        text = ", ".join(f"{_percent(each[0])} / {_percent(each[1])} ({name})" for name, each in known.items())
        return text, all(each[1] >= TARGET for each in known.values())

    (expected, reached), (sampled, reached_on_sample) = rule(ON_DISTRIBUTION), rule(on_sample(small))
    verdict = "reached" if reached and reached_on_sample else "missed"
    token = mean([relative(cell, cell.efficiency("cispo", small), small) for cell in wide])
    prefix = mean([relative(cell, mean(cell.adaptive["prefix"][small]), small) for cell in wide])
    return [
        "**No constant cap is right.** The best one of the trajectory weight grows with drift and n: from "
        f"{middle_cap(first, small)} at drift {first:g} and n = {small} to {middle_cap(last, large)} at drift {last:g} "
        f"and n = {large} (median over the listed tasks).",
        "**The rule of `tic_grpo_adaptive`, which is not told the drift,** is near it where R spreads little. Percent "
        f"of the best constant cap's η, mean / worst cell, with the rule's sums over the distribution: {expected}; "
        f"over the {small} responses of the update: {sampled}. The target of {TARGET:.0%} in every cell is {verdict}.",
        f"**With heavily shared parameters and large drift, bias costs less than variance.** On the sampled chains at "
        f"drift {last:g} and n = {small}, the token weights of `cispo` reach {_percent(token)} % of the η of the best "
        f"trajectory cap, and the rule for prefixes {_percent(prefix)} %.",
    ]


def efficiency_finding(found: Efficiencies) -> str:
    """The section in a paragraph."""
    first, *_ = efficiency_findings(found)
    return f"**Rules for stale data (section 9).** {first.replace('**', '')}"


def efficiency_section(found: Efficiencies) -> str:
    """The section, as Markdown."""
    size = found.size
    findings = "\n".join(f"- {line}" for line in efficiency_findings(found))
    ns = " / ".join(map(str, size.ns))
    last = size.drifts[-1]
    kappas = sorted(each for cell in found.cells for each in cell.noise_scale)
    low, high = kappas[len(kappas) // 10], kappas[-1 - len(kappas) // 10]
    return f"""## 9. Rules for stale data

{findings}

![Efficiency of every rule against drift, and the best cap](efficiency.png)

**What is measured.** ĝ is an update from n responses, g = ∇J(θ) at the current policy. Its efficiency is

η = (E ĝ·g)² / (‖g‖² · E‖ĝ‖²),

the gain of a step along ĝ with the best step size, as a share of the gain of a step along g. It lies between 0 and 1
and does not depend on the scale of ĝ. The root mean square error is no such measure: at practical n the zero update has
nearly the smallest. The contribution f of one response gives all of it: E ĝ = E f and E‖ĝ‖² = ‖E f‖²·(1 − 1/n) +
E‖f‖²/n.

**Settings.** One prompt and the true mean reward as baseline, so that responses are independent; normalisers and clips
are the package's. `cispo` and `vespo` have TRL's weights. Trees of {", ".join(map(str, size.tree_lengths))} tokens are
listed completely (vocabulary of 4; of 3 for the longest without shared parameters). Their parameters are one row of
logits per last token ("shared") or one per prefix ("not shared"). Their rewards come from the pairs of tokens, or are 0
or 1 at random for each trajectory. Chains of {", ".join(map(str, size.chain_lengths))} tokens are sampled
({size.samples:,} responses; the gradient is exact, moments are corrected for their bias). A cell has {size.policies} \
policies.
σ is the standard deviation of R under the behaviour policy. `vcpo` has its baseline E[w²‖s‖²r]/E[w²‖s‖²] of the
population instead of the other responses of a group, and its learning-rate factor is a scale. "Held" is min(w, c) with
the gradient kept.

### What each rule gains

η in percent of the best constant cap of the trajectory weight (chosen per cell, in hindsight), mean over the listed
tasks and lengths; n = {ns}:

{_comparison(found, sampled=False)}

The same for the sampled chains, in which five rows of logits serve all tokens:

{_comparison(found, sampled=True)}

Bias ‖E f − g‖/‖g‖ and variance (E‖f‖² − ‖E f‖²)/‖g‖² of the contribution f of one response, listed tasks. The variance
of an update is 1/n of it:

{_bias_and_noise(found)}

η on the sampled tasks at n = {size.ns[len(size.ns) // 2]}, ± standard error. A sample understates the tail of a weight
without a cap:

{_sampled(found)}

### The best constant cap

Of the trajectory weight, at n = {ns}; σ in brackets, mean over tasks:

{_best_caps(found)}

### How near the rule comes

`tic_grpo_adaptive` takes the c that minimises ((1 − S)² + κ/n·N)/S², with

S = Σ A²·u / Σ A²·w,  N = Σ A²·L·u² / Σ A²·L·w,

u = min(w, c) and L the length of a response. Since E[w] = 1, a denominator is no larger than it would be with w = 1,
and S is at most 1: a single large weight would otherwise be its own measure. A cap of 1 is always a candidate. The rule
assumes

- that the part of the signal that is cut off is lost as bias, the worst case;
- that a response's part in the signal is proportional to A² and in the noise to A²·L (Property 4.1);
- that κ = {NOISE_SCALE:g}, whatever the task. E[A²‖s‖²]/‖g‖² is {low:.0f} to {high:.0f} in 80 % of the cases here.

Each entry has the mean over cells, the worst cell and the worst single policy (against its own best cap), in percent of
η at the best constant cap, then the share of the cells that reach {TARGET:.0%}. "On the distribution": the sums of the
rule are expectations. "On its own sample": cap and update share n responses, as in training.
Where σ is large, a few of n responses hold most of the weight, and a sample knows little of the distribution. The first
form is the c that minimises (E[w − u]² + E[u²]/n)/E[u]², u = min(w, c). All of the trajectory weight:

{_nearness(found, "trajectory")}

Of the prefix product, in percent of its own best constant cap:

{_nearness(found, "prefix")}

The worst cells of the rule for trajectories, on the distribution. The last columns are in percent as above:

{_worst_cells(found)}

Responses whose advantage is 0 add nothing to ĝ but a factor, so η and the best cap are those of the other responses:
they do not count in n (section 1).

Read with care: the tasks are small, the direction of the drift is random, and a drift of {last:g} is large. η is about
one step; a rule that loses little of it may still move the policy to where the data is staler."""
