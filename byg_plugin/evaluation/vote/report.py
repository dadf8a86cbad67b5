"""What the votes say: win rates with their errors, tests by scipy, agreement of raters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from byg_plugin.evaluation.statistics import mean_of, name_of
from byg_plugin.evaluation.vote.ballots import Pair, Vote, counted
from byg_plugin.journal import replacing

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How often run a won.

    Attributes:
        votes, wins: counts.
        rate: wins / votes.
        sem: binomial, over votes: sqrt(rate (1 - rate) / votes).
        sem_of_raters: standard error of the mean of the raters' own rates; None of a single rater.
    """

    votes: int
    wins: int
    rate: float
    sem: float
    sem_of_raters: float | None


def rate_of(votes: Sequence[Vote]) -> Rate:
    """Of one vote or more."""
    wins = sum(vote.choice == "a" for vote in votes)
    rate = wins / len(votes)
    raters = {vote.rater for vote in votes}
    own = [float(np.mean([vote.choice == "a" for vote in votes if vote.rater == rater])) for rater in sorted(raters)]
    sem = (rate * (1 - rate) / len(votes)) ** 0.5
    return Rate(votes=len(votes), wins=wins, rate=rate, sem=sem, sem_of_raters=mean_of(own).sem)


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Agreement beyond chance of (items, categories) counts; items may have different numbers of raters.

    Fleiss 1971 for equal numbers; else the agreement of each item is weighted alike and chance is that of all votes. statsmodels' own
    takes equal numbers alone. None where no item has two votes, or all votes are one category.
    """
    counts = counts[counts.sum(1) > 1]
    if not len(counts):
        return None
    raters = counts.sum(1)
    agreement = float(np.mean(((counts**2).sum(1) - raters) / (raters * (raters - 1))))
    chance = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return None if chance == 1 else (agreement - chance) / (1 - chance)


def kappa_interval(counts: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval over items; None where kappa has no value."""
    draw = np.random.default_rng(seed)
    picked = (counts[draw.integers(0, len(counts), len(counts))] for _ in range(_RESAMPLES))
    values = [value for one in picked if (value := fleiss_kappa(one)) is not None]
    if fleiss_kappa(counts) is None or not values:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def summarise(votes: Sequence[Vote], pairs: Sequence[Pair]) -> dict[str, Any]:
    """The figures of a vote, ready for JSON.

    Raises:
        ValueError: nobody has voted on these pairs.
    """
    valid = counted(votes, pairs)
    if not valid:
        raise ValueError("there is no vote on these edits yet: serve the page without --report and vote")
    kinds = {pair.key: name_of(pair.a.edit_type) for pair in pairs}
    by_kind = {kind: [vote for vote in valid if kinds[vote.key] == kind] for kind in sorted(set(kinds.values()))}
    items = Counter(vote.key for vote in valid if vote.choice == "a"), Counter(vote.key for vote in valid if vote.choice == "b")
    table = np.array([[side[pair.key] for side in items] for pair in pairs])
    won, lost = int((table[:, 0] > table[:, 1]).sum()), int((table[:, 0] < table[:, 1]).sum())
    raters = sorted({vote.rater for vote in valid})
    whole = rate_of(valid)
    return {
        "all": asdict(whole),
        "by_type": {kind: asdict(rate_of(some)) for kind, some in by_kind.items() if some},
        "by_rater": {rater: asdict(rate_of([vote for vote in valid if vote.rater == rater])) for rater in raters},
        "binomial_p": p_value(whole.wins, whole.votes),
        "items": {"won": won, "lost": lost, "tied": int(((table[:, 0] == table[:, 1]) & (table.sum(1) > 0)).sum())},
        "sign_test_p": p_value(won, won + lost),
        "fleiss_kappa": fleiss_kappa(table),
        "fleiss_kappa_interval": kappa_interval(table),
        "unanswered": len(raters) * len(pairs) - len(valid),
        "changed": len([vote for vote in votes if vote.key in kinds]) - len(valid),
        "votes_on_other_edits": sum(vote.key not in kinds for vote in votes),
    }


def p_value(wins: int, of: int) -> float | None:
    """Two-sided binomial test of a rate of one half; None of no trial."""
    return float(binomtest(wins, of).pvalue) if of else None


def text(found: dict[str, Any]) -> str:
    """The figures in words."""
    lines = ["run a wins:"]
    for name, one in {"all": found["all"], **found["by_type"]}.items():
        raters = "" if one["sem_of_raters"] is None else f", over raters {100 * one['sem_of_raters']:.1f}"
        lines.append(f"  {name}: {100 * one['rate']:.1f} % +- {100 * one['sem']:.1f} (SEM over votes{raters}), {one['votes']} votes")
    lines.append("by rater: " + ", ".join(f"{name} {100 * one['rate']:.0f} %" for name, one in found["by_rater"].items()))
    items = found["items"]
    lines.append(f"binomial test: p = {found['binomial_p']:.2g}")
    sign = "no item has a majority" if found["sign_test_p"] is None else f"p = {found['sign_test_p']:.2g}"
    lines.append(f"items by majority: {items['won']} won, {items['lost']} lost, {items['tied']} tied; sign test: {sign}")
    if found["fleiss_kappa"] is not None:
        low, high = found["fleiss_kappa_interval"]
        lines.append(f"Fleiss' kappa: {found['fleiss_kappa']:.2f} ({low:.2f} to {high:.2f}, 95 % over items)")
    lines.append(f"unanswered: {found['unanswered']}; changed later: {found['changed']}; on other edits: {found['votes_on_other_edits']}")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Win rates with their errors over votes.

    Raises:
        ValueError: it cannot be written.
    """
    from matplotlib.figure import Figure

    rates = {"all": found["all"], **found["by_type"], **{f"rater {name}": one for name, one in found["by_rater"].items()}}
    figure = Figure(figsize=(8, 1 + 0.35 * len(rates)), layout="constrained")
    axes = figure.subplots()
    names = list(rates)[::-1]
    places = range(len(names))
    axes.barh(places, [100 * rates[name]["rate"] for name in names], xerr=[100 * rates[name]["sem"] for name in names], capsize=2)
    axes.set_yticks(places, names, parse_math=False)  # a name may hold dollars, which are no formula
    axes.axvline(50, color="grey", linewidth=0.8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("run a preferred, % of votes")
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")
