"""Print the results of several runs, the papers' sets in the form of Table 1 (v5), followed by their uncertainties."""

from typing import Any

from ..metrics.run_summary import table
from .statistics import Z, paired_difference


# Columns of Table 1: the metric and the title of each set
TABLE_1 = {"aime24": "Avg@32", "aime25": "Avg@32", "math500": "Avg@1", "livecodebench": "Avg@1"}
TITLES = {"aime24": "AIME24", "aime25": "AIME25", "math500": "MATH500", "livecodebench": "LiveCodeBench"}

Result = dict[str, Any]


def results_table(results: list[Result]) -> str:
    """Format results as Markdown: a table of averages, then the uncertainty of each number.

    If some result is of a set of Table 1, all columns of Table 1 are shown.

    Args:
        results: contents of `results.json` files. The first is the baseline of all differences.

    Returns:
        Two tables. Accuracies are in percent, differences in percentage points.
    """
    found = dict.fromkeys((name, one["metric"]) for result in results for name, one in result["sets"].items())
    columns = list(TABLE_1.items()) if any(name in TABLE_1 for name, _ in found) else []
    # A set of Table 1 with another metric replaces the paper's column, unless some result has that one too.
    replaced = {name for name, _ in found} - {name for name, metric in found if (name, metric) in columns}
    shown = [column for column in columns if column[0] not in replaced]
    shown += [column for column in found if column not in shown]
    order = [*TABLE_1, *(name for name, _ in found)]
    shown.sort(key=lambda column: order.index(column[0]))

    header = ["Method", *(TITLES.get(name, name) for name, _ in shown)]
    rows = [["", *(f"({metric})" for _, metric in shown)]]
    rows += [[result["name"], *(_cell(result, results[0], *column) for column in shown)] for result in results]
    return table(header, rows) + "\n\n" + _uncertainties(results) + "\n"


def _cell(result: Result, baseline: Result, name: str, metric: str) -> str:
    one, base = (r["sets"].get(name, {"metric": None}) for r in (result, baseline))
    if one["metric"] != metric:
        return "–"
    text = f"{100 * one['average']:.2f}"
    if result is not baseline and base["metric"] == metric:
        text += f" ({100 * (one['average'] - base['average']):+.2f})"
    return text


def _uncertainties(results: list[Result]) -> str:
    baseline, compared = results[0], len(results) > 1
    header = ["Method", "Set", "Problems × k", "Average", "95 % interval, other problems", "± 95 %, these problems"]
    header += [f"Difference from {baseline['name']}, paired 95 %"] if compared else []
    header += ["Excluded", "Truncated", "Mean tokens"]
    rows = []
    for result in results:
        for name, one in result["sets"].items():
            low, high = one["interval"]
            base = baseline["sets"].get(name) if result is not baseline else None
            rows.append(
                [
                    result["name"],
                    TITLES.get(name, name),
                    f"{one['problems']} × {one['k']}",
                    f"{100 * one['average']:.2f}",
                    f"{100 * low:.2f} to {100 * high:.2f}",
                    _or_dash("{:.2f}", one["sampling_error"], 100 * Z),
                    *([_difference(one, base)] if compared else []),
                    str(one["excluded"]),
                    _or_dash("{:.1f} %", one["truncated"], 100),
                    _or_dash("{:.1f}", one["mean_tokens"]),
                ]
            )
    return table(header, rows)


def _or_dash(template: str, value: float | None, factor: float = 1) -> str:
    return "–" if value is None else template.format(factor * value)


def _difference(one: Result, base: Result | None) -> str:
    if base is None or base["metric"] != one["metric"] or not one["means"].keys() & base["means"].keys():
        return "–"
    mean, interval = paired_difference(one["means"], base["means"])
    text = f"{100 * mean:+.2f}"
    return text if interval is None else f"{text} ({100 * interval[0]:+.2f} to {100 * interval[1]:+.2f})"
