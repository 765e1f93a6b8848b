"""Plots of records, as PNG for the card and SVG for everything else. The same records give the same bytes.

    accuracy      both sides per task, with 95 % intervals
    drop          each drop with its bounds, against its margin
    flips         every sample whose result changed, by its place in the order of the suite
    modules       every layer of the engine's model, by its distance from the baseline's
    sensitivity   what FP8 costs each Linear, layer by layer (of a calibration, not of a decision)

Tasks share an axis, in percent or points. A metric that is not a share is drawn in its own unit on the same axis, and
its label gives the value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.gate.modules import Compared, compare_modules
from fp8pipe.records import EvalReport, GateDecision, TaskDecision, metric_label
from fp8pipe.release.scores import in_points, interval_of, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp8pipe.records.calibration import Calibration

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_ON_WHITE = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"}
"""A white box behind labels, so that no grid line runs through a number."""
_BASELINE, _CANDIDATE = "#9aa5b1", "#2f6fde"
_COLOURS = {"accepted": "#2d8a5f", "rejected": "#c8372d", "inconclusive": "#c27c0e"}
_STYLE: Any = {  # Any: settings have many types, and matplotlib's stubs list their names
    "svg.hashsalt": "fp8pipe",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.color": _MUTED,
    "ytick.color": _INK,
    "ytick.major.size": 0,
    "grid.color": _GRID,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def write_plots(decision: GateDecision, baseline: EvalReport, candidate: EvalReport, folder: Path) -> dict[str, Path]:
    """Draw into `folder`: plot name -> its PNG, with the SVG beside it. Empty if no task was decided."""
    if not decision.tasks:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    draw: dict[str, Callable[[], Figure]] = {
        "drop": lambda: _drop(decision),
        "accuracy": lambda: _accuracy(decision, baseline, candidate),
        "flips": lambda: _flips(decision, baseline, candidate),
    }
    if baseline.proof is not None and candidate.proof is not None:
        compared = compare_modules(baseline.proof, candidate.proof)
        draw["modules"] = lambda: _modules(compared)
    return {name: _save(make, folder / name) for name, make in draw.items()}


def _save(make: Callable[[], Figure], stem: Path) -> Path:
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = make()
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        figure.savefig(stem.with_suffix(".png"), dpi=160, metadata={"Software": None})
    return stem.with_suffix(".png")


def _canvas(tasks: int, title: str, *, row: float = 0.62) -> tuple[Figure, Axes]:
    """A figure with one row per task, the first at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.7 + row * tasks))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_ylim(tasks - 0.4, -0.6)
    axes.grid(axis="x")
    return figure, axes


def _label_rows(axes: Axes, tasks: tuple[TaskDecision, ...]) -> None:
    axes.set_yticks(range(len(tasks)), [f"{metric_label(task, tasks)}\nn = {task.n:,}" for task in tasks])


def _scaled(value: float, task: TaskDecision) -> float:
    return 100 * value if in_points(task) else value


def _unit(decision: GateDecision, of_shares: str) -> str:
    return of_shares if all(map(in_points, decision.tasks)) else "in the metric's own unit"


# ---------------------------------------------------------------------------------------------- the three


def _drop(decision: GateDecision) -> Figure:
    from matplotlib.lines import Line2D

    figure, axes = _canvas(len(decision.tasks), "Drop from BF16 to FP8, with one-sided bounds")
    axes.axvline(0, color=_MUTED, linewidth=1)
    for row, task in enumerate(decision.tasks):
        colour = _COLOURS[task.verdict]
        low, at, high, margin = (
            _scaled(value, task) for value in (task.drop_lower, task.drop, task.drop_upper, task.margin)
        )
        axes.plot([margin, margin], [row - 0.32, row + 0.32], color=_INK, linewidth=1.6, linestyle=(0, (3, 2)))
        axes.plot([low, high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt")
        axes.plot([low, high], [row, row], linestyle="none", marker="|", markersize=11, markeredgewidth=2, color=colour)
        axes.plot(at, row, marker="o", markersize=7, color=colour)
        label = f"{number(task.drop, task)}  {task.verdict}"
        place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
        axes.annotate(label, (at, row), **place, color=colour, bbox=_ON_WHITE)
    _label_rows(axes, decision.tasks)
    axes.margins(x=0.08)
    axes.set_xlabel(f"drop, {_unit(decision, 'points')} (left of 0: FP8 is better), alpha {decision.alpha_spent:.3g}")
    handle = Line2D([], [], color=_INK, linewidth=1.6, linestyle=(0, (3, 2)))
    _legend(figure, [handle], ["margin: the largest acceptable drop"])
    return figure


def _accuracy(decision: GateDecision, baseline: EvalReport, candidate: EvalReport) -> Figure:
    figure, axes = _canvas(len(decision.tasks), "Score per task, with 95 % intervals", row=0.75)
    handles = []
    for offset, report, colour, pick in (
        (-0.15, baseline, _BASELINE, lambda task: task.baseline),
        (+0.15, candidate, _CANDIDATE, lambda task: task.candidate),
    ):
        handles.append(_side(axes, decision, report, offset, colour, pick))
    _label_rows(axes, decision.tasks)
    axes.margins(x=0.12)
    axes.set_xlabel(_unit(decision, "percent"))
    _legend(figure, handles, ["BF16 baseline", "FP8 checkpoint"])
    return figure


def _side(
    axes: Axes,
    decision: GateDecision,
    report: EvalReport,
    offset: float,
    colour: str,
    pick: Callable[[TaskDecision], float],
) -> Any:  # Any: matplotlib's handle for the legend
    handle: Any = None
    for row, task in enumerate(decision.tasks):
        mean = pick(task)
        low, high = (_scaled(value, task) for value in interval_of(report, task) or (mean, mean))
        at = _scaled(mean, task)
        axes.plot([low, high], [row + offset] * 2, color=colour, linewidth=2.4, solid_capstyle="round")
        (handle,) = axes.plot(at, row + offset, marker="o", markersize=7, color=colour, linestyle="none")
        axes.annotate(
            number(mean, task),
            (high, row + offset),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_INK,
            bbox=_ON_WHITE,
        )
    return handle


def _flips(decision: GateDecision, baseline: EvalReport, candidate: EvalReport) -> Figure:
    figure, axes = _canvas(len(decision.tasks), "Samples that changed from BF16 to FP8", row=0.8)
    handles: list[Any] = []  # Any: matplotlib's handles for the legend
    for row, task in enumerate(decision.tasks):
        worse, better = changed_samples(task, baseline, candidate)
        up, down = ([100 * i / task.n for i in positions] for positions in (better, worse))
        axes.plot([0, 100], [row, row], color=_MUTED, linewidth=0.8)
        handles = [
            axes.vlines(up, row - 0.3, row, colors=_CANDIDATE, linewidth=1),
            axes.vlines(down, row, row + 0.3, colors=_COLOURS["rejected"], linewidth=1),
        ]
        counts = f"{len(better)} better\n{len(worse)} worse"
        axes.annotate(
            counts,
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
    _label_rows(axes, decision.tasks)
    axes.grid(visible=False)
    axes.margins(x=0.01)
    axes.set_xlabel("place of the sample in its task, percent of the way through")
    _legend(figure, handles, ["better in FP8", "worse in FP8"])
    return figure


def changed_samples(task: TaskDecision, baseline: EvalReport, candidate: EvalReport) -> tuple[list[int], list[int]]:
    """Positions of the samples that got worse, and of those that got better."""
    sides = [report.task(task.task) for report in (baseline, candidate)]
    metrics = [side.samples_of(task.metric, task.filter) for side in sides if side is not None]
    one, other = metrics
    assert one is not None and other is not None, f"the gate compared {task.task}, so both sides must have it"
    sign = 1 if one.higher_is_better else -1
    gains = [sign * (after - before) for before, after in zip(one.values, other.values, strict=True)]
    return [i for i, gain in enumerate(gains) if gain < 0], [i for i, gain in enumerate(gains) if gain > 0]


def _legend(figure: Figure, handles: list[Any], labels: list[str]) -> None:  # Any: matplotlib's handles
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=9, handlelength=1.6)


# ---------------------------------------------------------------------------------------------- modules

KEPT = "not quantized"


def _modules(compared: Sequence[Compared]) -> Figure:
    """One row per kind of layer, one mark per layer, the bound of the kind as a dashed line."""
    from matplotlib.lines import Line2D

    kinds: dict[str, list[Compared]] = {}
    for one in compared:
        kinds.setdefault(kind_of(one), []).append(one)
    rows = sorted(kinds, key=lambda kind: (kind == KEPT, kinds[kind][0].bound, kind))
    figure, axes = _canvas(len(rows), "Distance of each layer's output from the BF16 model's", row=0.45)
    for row, kind in enumerate(rows):
        found = sorted(kinds[kind], key=lambda one: one.error)
        width = 100 * found[0].bound
        axes.plot([width, width], [row - 0.3, row + 0.3], color=_INK, linewidth=1.6, linestyle=(0, (3, 2)))
        at = [min(100 * one.error, 1.5 * width) for one in found]  # what is far off stays in the picture
        spread = [row + 0.22 * (place % 5 - 2) / 2 for place in range(len(found))]  # so that equal ones are all seen
        colours = [_CANDIDATE if one.error <= one.bound else _COLOURS["rejected"] for one in found]
        axes.scatter(at, spread, s=14, c=colours, alpha=0.6, linewidths=0)
    axes.set_yticks(range(len(rows)), [f"{kind}, n = {len(kinds[kind]):,}" for kind in rows])
    axes.set_xlim(left=-0.2)
    axes.set_xlabel("percent of the output's norm (left is better)")
    handle = Line2D([], [], color=_INK, linewidth=1.6, linestyle=(0, (3, 2)))
    _legend(figure, [handle], ["bound: the largest acceptable distance"])
    return figure


def kind_of(one: Compared) -> str:
    """The last part of a layer's name that says what it is (qkv_proj, experts, ...), if it is quantized."""
    if not one.candidate.scheme:
        return KEPT
    return "experts" if one.candidate.kind == "experts" else one.candidate.name.rpartition(".")[2]


# ---------------------------------------------------------------------------------------------- sensitivity

_SERIES = ("#2f6fde", "#c8372d", "#2d8a5f", "#c27c0e", "#7a4fbf", "#17818c", "#b5508e", "#5d6b1e")
"""Colours for kinds of Linears; with more kinds, they repeat with another marker."""
_MARKERS = ("o", "s", "^", "D")


def write_sensitivity_plot(calibration: Calibration, folder: Path) -> Path | None:
    """Draw `folder`/sensitivity.png and .svg. The path of the PNG; None if no Linear was measured."""
    if not calibration.layers:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return _save(lambda: _sensitivity(calibration), folder / "sensitivity")


def _sensitivity(calibration: Calibration) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    outputs, weights = figure.subplots(2, 1, sharex=True)
    handles = _decibels(outputs, calibration, "output_sqnr_db")
    outputs.set_title("Outputs: weight and input in FP8")
    _decibels(weights, calibration, "weight_sqnr_db")
    weights.set_title("Weights")
    weights.set_xlabel(f"decoder layer of {calibration.model_id}")
    figure.supylabel("signal to quantization noise, dB (higher is better)", fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=9, handlelength=1.2)
    return figure


def _decibels(axes: Axes, calibration: Calibration, field: str) -> dict[str, Any]:  # Any: matplotlib's handles
    """Draw one mark per Linear at its layer, and a line for whole layers: label -> handle."""
    layers = list(calibration.layers)
    whole = [getattr(layer, field) for layer in calibration.layers.values()]
    known = [(x, db) for x, db in enumerate(whole) if db is not None]
    (line,) = axes.plot(*zip(*known, strict=True), color=_INK, linewidth=1.2, zorder=3) if known else (None,)
    handles: dict[str, Any] = {"whole layer": line} if line is not None else {}
    for index, (kind, points) in enumerate(_by_kind(calibration, field, layers).items()):
        colour, marker = _SERIES[index % len(_SERIES)], _MARKERS[index // len(_SERIES) % len(_MARKERS)]
        style = {"linestyle": "none", "marker": marker, "markersize": 4.5, "markeredgewidth": 0, "alpha": 0.85}
        (handles[kind],) = axes.plot(*zip(*points, strict=True), color=colour, **style)
    low, high = axes.get_ylim()
    axes.set_ylim(
        min(low, (low + high) / 2 - 1.5), max(high, (low + high) / 2 + 1.5)
    )  # keep tenths of a dB from filling the axis
    axes.grid(axis="y")
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[attr-defined]  # matplotlib's default locator
    return handles


def _by_kind(calibration: Calibration, field: str, layers: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Last part of a Linear's name (q_proj, w1, ...) -> (layer, dB) of every Linear with it."""
    place = {layer: index for index, layer in enumerate(layers)}
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, one in calibration.sensitivity.items():
        db = getattr(one, field)
        if db is not None:
            kinds.setdefault(name.rpartition(".")[2], []).append((place[one.layer], db))
    return dict(sorted(kinds.items()))  # sorted: a kind has one colour in all models of an architecture
