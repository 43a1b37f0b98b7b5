"""Lines of results of the study of stale data, made up in their real schema."""

import json

from research.study.stale_results import ResultsFile, settings_of


def line(run, reward, accuracy=None, engine_steps=None, by_age=None, **ratios):
    """The line of a run from its reward by rollout, and its accuracy by update."""
    accuracy = accuracy or {0: 0.3, run.steps: reward[-1]}
    return json.loads(
        json.dumps(
            {
                "run": run.fields,
                "settings": settings_of(run),
                "versions": {"trl": "1.16.0", "torch": "2.9.0"},
                "seconds": 12.0,
                "reward": reward,
                "engine_steps": engine_steps or [40] * len(reward),
                "accuracy": list(accuracy.items()),
                "ratios": {"ess": 0.9, "log_std": 0.2} | ratios,
                "by_age": by_age or {str(run.lag): {"ess": 0.9, "log_std": 0.2}},
            }
        )
    )


def write_lines(path, lines):
    """Write a file of results, and return it as the study reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return ResultsFile(path)
