"""Names of metrics -> what judges an answer: a metric of metrics.py, or a function in a file of the user's.

In: names such as "token_f1" or "scores.py:is_polite". Out: Judges by the name that tables and metrics.jsonl
show. A function is called with the answer and the list of reference answers, and with the row as the data
file has it where it has a parameter `row`. It returns a number, of which higher is better.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from runpy import run_path
from typing import Any

from partwise.config.rules import metric_name
from partwise.errors import ConfigError, DataError
from partwise.evaluation.metrics import METRICS, best_score
from partwise.evaluation.questions import Question

Judge = Callable[[str, Question], float]


def load_judges(metrics: Sequence[str], where: str = "--metrics") -> dict[str, Judge]:
    """The judges by name, in order. `where` says in errors who named them.

    Raises:
        ConfigError: a metric is unknown or named twice, or a function cannot be loaded.
    """
    judges: dict[str, Judge] = {}
    for metric in metrics:
        name = metric_name(metric)
        if name in judges or (name != metric and name in METRICS):
            raise ConfigError(f"{where}: {name} names two metrics. Remove one, or rename the function.")
        judges[name] = load_function(metric, where) if ":" in metric else load_metric(metric, where)
    return judges


def load_metric(name: str, where: str) -> Judge:
    """Raises: ConfigError where there is none of that name."""
    if name not in METRICS:
        close = get_close_matches(name.lower(), METRICS, n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise ConfigError(
            f'{where}: "{name}" is not a metric.{hint} There are {", ".join(METRICS)}, and functions of your '
            "own as path/to/file.py:function."
        )
    metric = METRICS[name]
    return lambda answer, question: best_score(metric, answer, question.references)


def load_function(metric: str, where: str) -> Judge:
    """The function of "path/to/file.py:function".

    Raises:
        ConfigError: there is no such file or function, or the file raises when it is run.
    """
    file, _, name = metric.rpartition(":")
    if not Path(file).is_file():
        raise ConfigError(
            f"{where}: {metric}: there is no file {file} (from {Path.cwd()}). Correct the path."
        )
    try:
        names = run_path(file)
    except Exception as error:
        raise ConfigError(f"{where}: {metric}: {file} raises {type(error).__name__}: {error}.") from error
    function = names.get(name)
    if not callable(function):
        found = ", ".join(key for key, value in names.items() if inspect.isfunction(value)) or "none"
        raise ConfigError(f"{where}: {metric}: {file} has no function {name}. Its functions: {found}.")
    takes_row = "row" in inspect.signature(function).parameters

    def judge(answer: str, question: Question) -> float:
        extra = {"row": question.fields} if takes_row else {}
        return call(function, metric, answer, question, extra)

    return judge


def call(function: Callable, metric: str, answer: str, question: Question, extra: dict[str, Any]) -> float:
    """Raises: DataError where the function raises, or returns what is no finite number."""
    try:
        value = function(answer, list(question.references), **extra)
    except Exception as error:
        raise DataError(
            f"{question.name}: {metric} raises {type(error).__name__}: {error}, for the answer "
            f"{answer[:80]!r}. Mend the function."
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{question.name}: {metric} returns {value!r:.80}. It must return a finite number.")
    return number
