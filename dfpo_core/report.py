"""The evaluation report: one HTML file with its figures inside, readable from a laptop, a KFP artifact tab or an e-mail.

Nothing is loaded from elsewhere, and every text that comes from data or models is escaped.
"""

from __future__ import annotations

from html import escape
from itertools import zip_longest
from typing import Any

from dfpo_core.config import PipelineConfig
from dfpo_core.html import image, page, section, shortened, table, text_cell
from dfpo_core.promote import Decision
from dfpo_core.tracking import flatten, noise_tag

NAMES = {"base": "Base", "sft": "SFT", "trained": "Trained", "champion": "Champion"}
SPLIT_NAMES = {"id_test": "In domain", "ood_test": "Out of domain"}
COLOURS = {"base": "#9aa5b1", "sft": "#d99a3d", "trained": "#2f6db5", "champion": "#6b4fa0"}
SHOWN_SAMPLES = 24
_FIGURE_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def render(
    config: PipelineConfig, evaluation: dict[str, Any], answers: list[dict[str, Any]], decision: Decision, drawings: dict[str, Any]
) -> str:
    """The whole report as HTML text; `drawings` are `figures(evaluation)`, with `value_fan` and `calibration` where there is a critic."""
    drawn = {name: image(figure, _ALTERNATIVES[name]) for name, figure in drawings.items()}
    sections = [
        _heading(config, evaluation),
        _gate(decision),
        section("Accuracy", drawn["accuracy"] + _accuracy_table(evaluation), "Greedy answers, with bootstrap intervals over questions."),
        _conversations(evaluation),
        section("Paired differences", drawn["differences"], "Same questions for both policies, so hard questions cancel out."),
        _critic(drawn),
        section("Sample answers", _samples(answers), "Chosen to show gains, losses, and questions that nobody answers."),
        _configuration(config),
    ]
    return page(config.name, sections)


# ---------------------------------------------------------------------------------------------------------- figures


def figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The matplotlib figures by name: `accuracy` and `differences`."""
    import matplotlib

    with matplotlib.rc_context(_FIGURE_STYLE):
        return {"accuracy": _accuracy_figure(evaluation["accuracy"]), "differences": _differences_figure(evaluation["differences"])}


def _accuracy_figure(entries: list[dict[str, Any]]):
    """Accuracy with its interval: one row a domain, one point a model, one panel a split."""
    from matplotlib.figure import Figure

    splits = list(dict.fromkeys(entry["split"] for entry in entries))
    labels = list(dict.fromkeys(entry["model"] for entry in entries))
    domains = {split: list(dict.fromkeys(e["domain"] for e in entries if e["split"] == split)) for split in splits}
    heights = [len(domains[split]) for split in splits]
    figure = Figure(figsize=(9, 1.6 + 0.2 * (len(labels) + 1) * sum(heights)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    panels = figure.subplots(len(splits), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, split in zip(panels, splits, strict=True):
        for index, label in enumerate(labels):
            mine = [entry for entry in entries if entry["split"] == split and entry["model"] == label]
            offset = (index - (len(labels) - 1) / 2) * 0.8 / len(labels)
            at = [domains[split].index(entry["domain"]) + offset for entry in mine]
            _points(axes, mine, at, COLOURS.get(label, "#444"), NAMES.get(label, label))
        _domain_axis(axes, domains[split], SPLIT_NAMES.get(split, split))
        axes.set_xlim(0, 1)
    panels[-1].set_xlabel("accuracy")
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(labels), frameon=False)
    return figure


def _differences_figure(entries: list[dict[str, Any]]):
    """A forest of the paired differences over all questions of a split."""
    from matplotlib.figure import Figure

    entries = [entry for entry in entries if entry["domain"] == "all"]
    figure = Figure(figsize=(9, 0.9 + 0.36 * len(entries)), layout="constrained")
    axes = figure.subplots()
    for row, entry in enumerate(entries):
        _points(axes, [entry], [row], COLOURS.get(entry["first"], "#444"), None)
    names = [f"{SPLIT_NAMES.get(e['split'], e['split'])}: {_name(e['first'])} − {_name(e['second'])}" for e in entries]
    axes.axvline(0, color="#5b6875", linewidth=1, zorder=0)
    _domain_axis(axes, names, "")
    reach = max([abs(entry[bound]) for entry in entries for bound in ("low", "high")] + [0.02]) * 1.15
    axes.set_xlim(-reach, reach)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:+.0f}".replace("+0", "0").replace("-0", "0"))
    axes.set_xlabel("difference in accuracy, percentage points")
    return figure


def _points(axes, entries: list[dict[str, Any]], at: list[float], colour: str, label: str | None) -> None:
    means = [entry["mean"] for entry in entries]
    # the percentile interval of a skewed mean need not contain it: a bar has no negative length
    below = [max(0.0, entry["mean"] - entry["low"]) for entry in entries]
    above = [max(0.0, entry["high"] - entry["mean"]) for entry in entries]
    axes.errorbar(means, at, xerr=[below, above], fmt="o", markersize=5.5, color=colour, elinewidth=2, label=label, clip_on=False)


def _domain_axis(axes, names: list[str], title: str) -> None:
    axes.set_yticks(range(len(names)), ["all questions" if name == "all" else shortened(name, 36) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=8)


_ALTERNATIVES = {
    "accuracy": "Accuracy by split and model, as in the table",
    "differences": "Paired differences by split, with intervals",
    "value_fan": "Return distribution at each token of one response, with advantage and uncertainty",
    "calibration": "Coverage of the critic's quantiles, and realised return by predicted value",
}


# ---------------------------------------------------------------------------------------------------------- sections


def _heading(config: PipelineConfig, evaluation: dict[str, Any]) -> str:
    counts = {entry["split"]: entry["count"] for entry in evaluation["accuracy"] if entry["domain"] == "all"}
    sizes = ", ".join(f"{count} questions {SPLIT_NAMES.get(split, split).lower()}" for split, count in counts.items())
    facts = f"{config.train.algorithm} on {config.model}, label noise {noise_tag(config)}, seed {config.seed}; {sizes}."
    return f'<h1>{escape(config.name)}</h1><p class="soft">{escape(facts)}</p>\n'


def _gate(decision: Decision) -> str:
    verdict = "The gate holds: this policy may become champion" if decision.promoted else "The gate does not hold"
    tone, rival = ("good" if decision.promoted else "bad"), _name(decision.rival)
    limit = f"> {_points_text(decision.min_id_gain)}"
    rows = [[f"In domain, trained − {rival}", _points_text(decision.id_gain), _points_text(decision.id_low), limit]]
    if decision.ood_gain is not None and decision.ood_low is not None:
        limit = f"≥ {_points_text(-decision.max_ood_loss)}"
        rows.append([f"Out of domain, trained − {rival}", _points_text(decision.ood_gain), _points_text(decision.ood_low), limit])
    bounds = table(["Comparison", "Difference", "Lower bound", "Required bound"], [[escape(cell) for cell in row] for row in rows])
    return f'<section class="banner {tone}"><h2 class="{tone}">{verdict}</h2><p>{escape(decision.reason)}</p>{bounds}</section>\n'


def _critic(drawn: dict[str, str]) -> str:
    """What the critic expects of sampled in-domain responses; nothing for an algorithm without one."""
    if "value_fan" not in drawn:
        return ""
    note = "Returns expected at each token of a held-out response, and whether such expectations hold. Realised returns are clean rewards."
    return section("The critic", drawn["value_fan"] + drawn["calibration"], note)


def _accuracy_table(evaluation: dict[str, Any]) -> str:
    labels = [policy["label"] for policy in evaluation["models"]]
    values = {(entry["split"], entry["domain"], entry["model"]): entry for entry in evaluation["accuracy"]}
    sampled = {(entry["split"], entry["domain"], entry["model"]): entry for entry in evaluation["mean_at_k"]}
    rows = []
    for split, domain in dict.fromkeys((split, domain) for split, domain, _ in values):
        name = "all questions" if domain == "all" else domain
        cells = [escape(SPLIT_NAMES.get(split, split)), escape(name), str(values[split, domain, labels[0]]["count"])]
        for label in labels:
            extra = sampled.get((split, domain, label))
            mean_at_k = f'<br><span class="soft">mean@{evaluation["settings"]["samples"]} {extra["mean"]:.1%}</span>' if extra else ""
            cells.append(_with_interval(values[split, domain, label]) + mean_at_k)
        rows.append(cells)
    return table(["Split", "Domain", "Questions", *map(_name, labels)], rows, numbers_from=2)


def _conversations(evaluation: dict[str, Any]) -> str:
    """Completion rates of conversations by split and domain; nothing where there are none."""
    entries = {(entry["split"], entry["domain"], entry["rate"], entry["model"]): entry for entry in evaluation["completion"]}
    if not entries:
        return ""
    labels = [policy["label"] for policy in evaluation["models"]]
    rows = []
    for split, domain, rate in dict.fromkeys(key[:3] for key in entries):
        name = "all conversations" if domain == "all" else domain
        cells = [escape(SPLIT_NAMES.get(split, split)), escape(name), escape(rate), str(entries[split, domain, rate, labels[0]]["count"])]
        rows.append(cells + [_with_interval(entries[split, domain, rate, label]) for label in labels])
    listed = table(["Split", "Domain", "Rate", "Conversations", *map(_name, labels)], rows, numbers_from=3)
    note = "task: every call of the goal, and no wrong booking; ask: everything asked for was told, where something was; goal: both."
    return section("Completion of conversations", listed, note)


def _samples(answers: list[dict[str, Any]]) -> str:
    rows = []
    for sample in pick_samples(answers, SHOWN_SAMPLES):
        cells = [text_cell(sample["question"], 600), text_cell(sample["answer"], 400, "short")]
        for label in sample["models"]:
            right = sample[f"{label}_correct"]
            mark = '<span class="mark good" title="right">✓</span>' if right else '<span class="mark bad" title="wrong">✗</span>'
            cells.append(text_cell(sample[f"{label}_response"], 400, "short", mark))
        rows.append([escape(SPLIT_NAMES.get(sample["split"], sample["split"])), *cells])
    labels = list(dict.fromkeys(row["model"] for row in answers))
    return table(["Split", "Question", "Truth", *map(_name, labels)], rows, numbers_from=99)


def pick_samples(answers: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Up to `count` questions with every policy's response, taken in turn from: newly right after training, newly wrong,
    wrong for all, and the rest. Columns: split, domain, row_id, question, answer, models, <model>_response, <model>_correct."""
    questions: dict[tuple[str, str], dict[str, Any]] = {}
    for row in answers:
        shared = {name: row[name] for name in ("split", "domain", "row_id", "question", "answer")}
        sample = questions.setdefault((row["split"], row["row_id"]), shared | {"models": []})
        sample["models"].append(row["model"])
        sample |= {f"{row['model']}_response": row["response"], f"{row['model']}_correct": row["correct"]}
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sample in questions.values():
        before, after = sample["sft_correct"], sample["trained_correct"]
        never = not any(sample[f"{label}_correct"] for label in sample["models"])
        kind = "3 never" if never else "4 rest" if before == after else "1 gained" if after else "2 lost"
        kinds.setdefault((kind, sample["split"]), []).append(sample)
    turns = zip_longest(*(kinds[key] for key in sorted(kinds)))
    return [sample for turn in turns for sample in turn if sample is not None][:count]


def _configuration(config: PipelineConfig) -> str:
    flat = flatten(config.model_dump(mode="json", exclude={"cluster"}))
    rows = [[f"<code>{escape(key)}</code>", f"<code>{escape(shortened(str(value), 300))}</code>"] for key, value in flat.items()]
    listed = table(["Key", "Value"], rows, numbers_from=99)
    return f"<section><details><summary>Configuration ({len(rows)} values)</summary>{listed}</details></section>\n"


# ---------------------------------------------------------------------------------------------------------- text


def _with_interval(entry: dict[str, Any]) -> str:
    return f'{entry["mean"]:.1%} <span class="soft">[{entry["low"] * 100:.1f}, {entry["high"] * 100:.1f}]</span>'


def _points_text(value: float) -> str:
    return f"{value * 100:+.1f} points"


def _name(label: str) -> str:
    return NAMES.get(label, label)
