"""Simulate the gate's error rates and power, and compare it with the rules that others gate by, on the same data.

    python -m benchmarks.gate [--evaluations 10000] [--bootstrap 1000] [--docs docs]

Each evaluation draws n paired 0/1 answers with a given discordance (share right on one side only) and true drop; the
baseline is right in 75 % of cases. The command writes docs/gate-simulation.md with every cell, and a plot as PNG and
SVG. All draws are seeded, so the same command writes the same files.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.page import prose
from fp8pipe.config import look_sizes
from fp8pipe.gate.power import Design
from fp8pipe.gate.statistics import paired_test, rejection_p, score_statistic

ALPHA, MARGIN, ACCURACY = 0.05, 0.02, 0.75
SIZES, DISCORDANCES = (250, 500, 1319, 4000), (0.03, 0.06, 0.10)
DROPS = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
LOOKS, ATTEMPTS = (0.25, 0.5, 1.0), 3
BOOTSTRAP_SIZES, RESAMPLES, CLUSTERS = (250, 500), 999, 50

ACCEPTED, OPEN, REJECTED = 1, 0, -1
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Cell:
    """One true state of the world, and how often the gate accepts and rejects it."""

    n: int
    discordance: float
    drop: float
    accepted: float
    rejected: float
    planned: float = math.nan
    """Probability of acceptance that `plan-eval` reports."""


# ---------------------------------------------------------------------------------------------- the gate


def verdicts(lost: Ints, won: Ints, n: int, alpha: float) -> Ints:
    """The gate's verdict on each table."""
    statistic = score_statistic(lost, won, n, MARGIN)
    result = np.where(stats.norm.cdf(statistic) < alpha, ACCEPTED, OPEN)
    for i in np.flatnonzero(stats.norm.sf(statistic) < alpha):  # count the tail only where it can matter
        result[i] = REJECTED if _rejects(int(lost[i]), int(won[i]), n, alpha) else OPEN
    return result


@cache
def _rejects(lost: int, won: int, n: int, alpha: float) -> bool:
    return rejection_p(lost, won, n, MARGIN) < alpha


def drawn(random: np.random.Generator, n: int, discordance: float, drop: float, count: int) -> tuple[Ints, ...]:
    """Numbers of samples lost, won and right on both sides, in each of `count` evaluations of n samples."""
    lost, won = (discordance + drop) / 2, (discordance - drop) / 2
    return tuple(random.multinomial(n, [lost, won, ACCURACY - lost, 1 - ACCURACY - won], size=count).T[:3])


def followed(
    random: np.random.Generator,
    n: int,
    discordance: float,
    drop: float,
    count: int,
    looks: Sequence[float],
    alpha: float,
) -> Ints:
    """Verdicts of `count` evaluations, each of which grows from look to look until it is decided."""
    lost, won, before = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64), 0
    verdict = np.full(count, OPEN)
    for size in look_sizes(n, looks):
        more = drawn(random, size - before, discordance, drop, count)
        lost, won, before = lost + more[0], won + more[1], size
        verdict = np.where(verdict == OPEN, verdicts(lost, won, size, alpha), verdict)
    return verdict


def simulate(design: str, n: int, discordance: float, count: int) -> list[Cell]:
    """One cell per true drop at this size and discordance, under one of the designs."""
    random = np.random.default_rng([n, int(1000 * discordance), len(design)])
    looks = LOOKS if "looks" in design else (1.0,)
    attempts = ATTEMPTS if "ladder" in design else 1
    alpha = ALPHA / (len(looks) * attempts)
    cells = []
    for drop in DROPS:
        if drop > discordance:
            continue
        # All recipes of the ladder have the same true drop; the next one is tried only after a rejection.
        verdict, refused = np.full(count, REJECTED), np.zeros(count, dtype=bool)
        for _ in range(attempts):
            tried = verdict == REJECTED
            verdict = np.where(tried, followed(random, n, discordance, drop, count, looks, alpha), verdict)
            refused |= tried & (verdict == REJECTED)
        planned = Design(discordance, alpha, looks).power(n, MARGIN, drop)
        cells.append(Cell(n, discordance, drop, float((verdict == ACCEPTED).mean()), float(refused.mean()), planned))
    return cells


def exact_at_margin(n: int, discordance: float) -> tuple[float, float]:
    """Exact probabilities that a drop of the margin is accepted, and that it is rejected, in one look."""
    rates = [(discordance + MARGIN) / 2, (discordance - MARGIN) / 2, 1 - discordance]
    lost, won = (axis.ravel() for axis in np.indices((n + 1, n + 1)))
    chance = stats.multinomial.pmf(np.stack([lost, won, n - lost - won], axis=1), n, rates)
    likely = (lost + won <= n) & (chance > 1e-9)
    verdict = verdicts(lost[likely], won[likely], n, ALPHA)
    return float(chance[likely][verdict == ACCEPTED].sum()), float(chance[likely][verdict == REJECTED].sum())


# ---------------------------------------------------------------------------------------------- others' rules


Rule = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]
OTHERS: dict[str, Rule] = {
    "llm-compressor: round(recovery, 2) >= 0.95": lambda base, ours: np.round(ours / base, 2) >= 0.95,
    "vLLM: at least 92 % of the baseline": lambda base, ours: ours >= base * (1 - 0.08),
    "drop of at most 1 point": lambda base, ours: base - ours <= 0.01 + 1e-12,
}


def compare(n: int, discordance: float, count: int) -> list[tuple[str, dict[float, float]]]:
    """How often each rule passes each drop, the gate first. All see the same draws."""
    random = np.random.default_rng([n, int(1000 * discordance)])
    passed: dict[str, dict[float, float]] = {name: {} for name in ("the gate", *OTHERS)}
    for drop in DROPS:
        if drop > discordance:
            continue
        lost, won, both = drawn(random, n, discordance, drop, count)
        base, ours = (both + lost) / n, (both + won) / n
        passed["the gate"][drop] = float((verdicts(lost, won, n, ALPHA) == ACCEPTED).mean())
        for name, rule in OTHERS.items():
            passed[name][drop] = float(rule(base, ours).mean())
    return list(passed.items())


# ---------------------------------------------------------------------------------------------- bootstrap


def bootstrap(kind: str, n: int, discordance: float, count: int) -> list[Cell]:
    """Graded metrics (a differing answer changes by 0.5 to 1), or 0/1 answers in clusters that flip together."""
    random = np.random.default_rng([n, int(1000 * discordance), len(kind)])
    cells = []
    for drop in DROPS:
        if drop > discordance * (0.75 if kind == "graded" else 1):
            continue
        outcome = [_bootstrap_once(random, kind, n, discordance, drop) for _ in range(count)]
        accepted, rejected = (float(np.mean([one == wanted for one in outcome])) for wanted in (ACCEPTED, REJECTED))
        cells.append(Cell(n, discordance, drop, accepted, rejected))
    return cells


def _bootstrap_once(random: np.random.Generator, kind: str, n: int, discordance: float, drop: float) -> int:
    if kind == "graded":
        rates = (discordance + drop / 0.75) / 2, (discordance - drop / 0.75) / 2
        sign = random.choice([1, -1, 0], size=n, p=[*rates, 1 - discordance])
        losses, clusters = sign * random.uniform(0.5, 1, n), []
    else:
        members = np.arange(n) % CLUSTERS
        share = random.gamma(2.0, 0.5, CLUSTERS)[members]  # mean 1: some clusters flip three times as often
        chances = share * (discordance + drop) / 2, share * (discordance - drop) / 2
        draw = random.random(n)
        losses = np.where(draw < chances[0], 1.0, np.where(draw < chances[0] + chances[1], -1.0, 0.0))
        clusters = [str(member) for member in members]
    ours = (losses > 0) * np.abs(losses) + (losses == 0)
    test = paired_test(ours, ours - losses, clusters, MARGIN, resamples=RESAMPLES)
    return ACCEPTED if test.p_accept < ALPHA else REJECTED if test.p_reject < ALPHA else OPEN


# ---------------------------------------------------------------------------------------------- report

DESIGNS = {
    "one look": "One look",
    "looks": f"Looks at {', '.join(f'{share:.0%}' for share in LOOKS)} of the samples",
    "ladder": f"A ladder of {ATTEMPTS} recipes, all with the same true drop",
    "looks and ladder": "The same looks on each rung of the same ladder",
}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=10_000)
    parser.add_argument("--bootstrap", type=int, default=1_000)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    with ProcessPoolExecutor(2) as pool:
        pairs = [(n, d) for n in SIZES for d in DISCORDANCES]
        small = [(n, d) for n in BOOTSTRAP_SIZES for d in DISCORDANCES]
        exact = {name: [pool.submit(simulate, name, *pair, options.evaluations) for pair in pairs] for name in DESIGNS}
        others = {pair: pool.submit(compare, *pair, options.evaluations) for pair in pairs}
        resampled = {
            kind: [pool.submit(bootstrap, kind, *pair, options.bootstrap) for pair in small]
            for kind in ("graded", "clustered")
        }
        cells = {name: [cell for job in jobs for cell in job.result()] for name, jobs in exact.items()}
        compared = {pair: job.result() for pair, job in others.items()}
        boot = {kind: [cell for job in jobs for cell in job.result()] for kind, jobs in resampled.items()}
    text = report(cells, compared, boot, options.evaluations, options.bootstrap)
    options.docs.mkdir(exist_ok=True)
    (options.docs / "gate-simulation.md").write_text(text)
    plot(cells["one look"], compared, options.docs / "gate-simulation")
    print(text)


def report(
    cells: dict[str, list[Cell]],
    compared: dict[tuple[int, float], list[tuple[str, dict[float, float]]]],
    boot: dict[str, list[Cell]],
    count: int,
    boot_count: int,
) -> str:
    """The whole page."""
    intro = prose(
        f"How often does the gate decide wrongly, at a margin of {100 * MARGIN:g} points and an alpha of "
        f"{100 * ALPHA:g} %? Each cell is the result of {count:,} simulated evaluations: `accepted / rejected`, in "
        "percent of them; the rest were inconclusive. Three standard errors of a rate of alpha are "
        f"{100 * slack(count):.2f} points. `plan` is the power that `fp8pipe plan-eval` reports. Written by "
        "`python -m benchmarks.gate`; do not edit."
    )
    picture = "![How often each rule passes a true drop](gate-simulation.png)"
    parts = [f"# The gate by simulation\n\n{intro}\n\n{picture}\n"]
    for name, title in DESIGNS.items():
        parts += [f"## {title}\n", grid(cells[name]), *judgement(cells[name], count)]
    parts += ["## Smaller than any shipped suite\n", f"{SMALL_TEXT}\n", small_grid()]
    parts += ["## Other rules on the same data\n", f"{OTHERS_TEXT}\n", others_grid(compared)]
    titles = {
        "graded": "Graded metric, paired bootstrap",
        "clustered": f"0/1 answers in {CLUSTERS} clusters, cluster bootstrap",
    }
    for kind, title in titles.items():
        parts += [
            f"## {title}\n",
            f"{boot_count:,} evaluations per cell, {RESAMPLES} resamples each.\n",
            grid(boot[kind]),
        ]
        parts += judgement(boot[kind], boot_count)
    return "\n".join(parts)


OTHERS_TEXT = prose(
    "Percent of evaluations that each rule passes, on the same draws from a baseline of 75 % accuracy. A rule that "
    "compares two point estimates controls no error rate: what it passes depends on n and on luck. At 75 %, a recovery "
    "of 0.945 (which rounds to 0.95) is a drop of 4.1 points, and 92 % of the baseline is a drop of 6."
)
SMALL_TEXT = prose(
    "Computed from the probability of every table, not drawn, at a true drop of the margin. False rejections stay "
    "below alpha because the tail is counted. False acceptances exceed it in one corner: where every difference is a "
    "loss (differing = margin) and n is close to 133, the smallest n at which a model without any difference is "
    "accepted. There a single event, no loss in n samples, decides, and its probability is 0.98^n."
)


def slack(count: int) -> float:
    """Three standard errors of a rate of alpha."""
    return 3 * math.sqrt(ALPHA * (1 - ALPHA) / count)


def judgement(cells: list[Cell], count: int) -> list[str]:
    """The largest error rates, every cell above the limit, and how well the plan predicts the power."""
    limit = ALPHA + slack(count)
    broken = [
        f"n={cell.n}, {cell.discordance:.0%} discordance, drop {100 * cell.drop:g}: {what} in {100 * rate:.2f} %"
        for cell in cells
        for what, rate, wrong in (
            ("accepted", cell.accepted, cell.drop >= MARGIN),
            ("rejected", cell.rejected, cell.drop <= MARGIN),
        )
        if wrong and rate > limit
    ]
    worst = (
        max(cell.accepted for cell in cells if cell.drop >= MARGIN),
        max(cell.rejected for cell in cells if cell.drop <= MARGIN),
    )
    lines = [
        f"- largest false acceptance {100 * worst[0]:.2f} %, largest false rejection {100 * worst[1]:.2f} %; "
        + (f"above {100 * limit:.2f} %: {'; '.join(broken)}" if broken else f"no cell above {100 * limit:.2f} %")
    ]
    planned = [cell for cell in cells if not math.isnan(cell.planned) and cell.drop == 0]
    if planned:
        off = max(abs(cell.accepted - cell.planned) for cell in planned)
        lines.append(f"- the power is within {100 * off:.2f} points of what `plan-eval` reports")
    return ["\n".join(lines) + "\n"]


def grid(cells: list[Cell]) -> str:
    """One row per size and discordance, one column per drop."""
    by_key = {(cell.n, cell.discordance, cell.drop): cell for cell in cells}
    with_plan = any(not math.isnan(cell.planned) for cell in cells)
    head = ["n", "differing", *(f"drop {100 * drop:g}" for drop in DROPS), *(["plan, drop 0"] if with_plan else [])]
    rows = []
    for n, discordance in dict.fromkeys((cell.n, cell.discordance) for cell in cells):
        found = [by_key.get((n, discordance, drop)) for drop in DROPS]
        shown = [f"{100 * c.accepted:.2f} / {100 * c.rejected:.2f}" if c else "" for c in found]
        plan = [f"{100 * by_key[n, discordance, 0.0].planned:.2f}"] if with_plan else []
        rows.append([f"{n:,}", f"{discordance:.0%}", *shown, *plan])
    return table(head, rows)


def small_grid() -> str:
    """Exact error rates at the margin for small n, down to where every difference is a loss."""
    differing = (MARGIN, *DISCORDANCES)
    rows = []
    for n in (100, 133, 150, 200):
        rates = [exact_at_margin(n, discordance) for discordance in differing]
        rows.append([str(n), *(f"{100 * accepted:.2f} / {100 * rejected:.2f}" for accepted, rejected in rates)])
    return table(["n", *(f"{discordance:.0%} differing" for discordance in differing)], rows)


def others_grid(compared: dict[tuple[int, float], list[tuple[str, dict[float, float]]]]) -> str:
    """One row per size, discordance and rule."""
    rows = [
        [f"{n:,}", f"{discordance:.0%}", name]
        + [f"{100 * passed[drop]:.2f}" if drop in passed else "" for drop in DROPS]
        for (n, discordance), rules in compared.items()
        for name, passed in rules
    ]
    return table(["n", "differing", "rule", *(f"drop {100 * drop:g}" for drop in DROPS)], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(
    cells: list[Cell], compared: dict[tuple[int, float], list[tuple[str, dict[float, float]]]], stem: Path
) -> None:
    """Plot how often each rule passes a true drop at 6 % discordance, one panel per n: gate, plan, other rules."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.hashsalt": "fp8pipe", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    figure = Figure(figsize=(11, 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(SIZES), sharey=True)
    colours = ["#2f6fde", "#c8372d", "#c27c0e", "#7b8794"]
    for axis, n in zip(axes, SIZES, strict=True):
        for (name, passed), colour in zip(compared[n, 0.06], colours, strict=True):
            points = [100 * drop for drop in passed], [100 * rate for rate in passed.values()]
            axis.plot(*points, color=colour, marker="o", markersize=3, label=name, zorder=3)
        mine = [cell for cell in cells if (cell.n, cell.discordance) == (n, 0.06)]
        planned = [100 * cell.drop for cell in mine], [100 * cell.planned for cell in mine]
        axis.plot(*planned, color="black", linestyle=":", linewidth=1, label="the gate, as planned", zorder=4)
        axis.axvline(100 * MARGIN, color="#9aa5b1", linewidth=0.8)
        axis.axhline(100 * ALPHA, color="#9aa5b1", linewidth=0.8)
        axis.set_title(f"n = {n:,}, 6 % differ", loc="left", fontweight="bold")
        axis.set_xlabel("true drop, points")
        axis.set_xlim(0, 5)
        axis.set_ylim(-2, 102)
    axes[0].set_ylabel("passed, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    figure.savefig(stem.with_suffix(".png"), dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
