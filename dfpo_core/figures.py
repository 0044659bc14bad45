"""Figures of a training run: learning curves, what the critic believes along one response, and whether it is right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PANELS = {
    "reward": ("reward/noisy", "reward/clean"),
    "KL to the SFT policy (nats a token)": ("policy/kl_to_sft",),
    "entropy (nats)": ("policy/entropy",),
    "explained variance": ("critic/explained_variance",),
    "value": ("critic/value_mean", "critic/value_spread"),
    "response length (tokens)": ("rollout/response_length",),
}
BANDS = (0.9, 0.5)  # central shares of the return distribution, widest first


def learning_curves(history: list[dict[str, float]]):
    """The metrics that a person looks at first, over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for key in keys:
            points = [(i + 1, m[key]) for i, m in enumerate(history) if key in m]
            if points:
                axis.plot(*zip(*points, strict=True), label=key.split("/")[1].replace("_", " "))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        if len(axis.lines) > 1:
            axis.legend(fontsize=8, frameon=False)
        elif not axis.lines:
            axis.text(0.5, 0.5, "no critic", ha="center", va="center", transform=axis.transAxes)
    return figure


def value_fan(tokens: Sequence[str], returns: np.ndarray, values: np.ndarray, advantages: np.ndarray, uncertainty: np.ndarray, title: str):
    """One response, a token a column: the return distribution as a fan, and below it the advantage and the uncertainty.

    tokens: T strings; returns (T, K) sorted samples; values, advantages, uncertainty (T,), in units of the return (advantages
    whitened).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.55 * len(tokens) + 2.5), 6), layout="constrained")
    fan, gain, spread = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    columns = np.arange(len(tokens))
    for shade, share in zip((0.18, 0.35), BANDS, strict=True):
        low, high = np.quantile(returns, [(1 - share) / 2, (1 + share) / 2], axis=1)
        fan.fill_between(columns, low, high, alpha=shade, color="tab:blue", linewidth=0, label=f"central {share:.0%}")
    fan.plot(columns, np.median(returns, axis=1), color="tab:blue", linewidth=1, label="median")
    fan.plot(columns, values, color="black", marker="o", markersize=3, linewidth=1.2, label="value (mean)")
    fan.set_ylabel("return")
    fan.set_title(title, fontsize=10)
    fan.legend(fontsize=8, frameon=False, ncols=2)
    gain.bar(columns, advantages, color=np.where(advantages >= 0, "tab:green", "tab:red"), width=0.7)
    gain.axhline(0, color="black", linewidth=0.8)
    gain.set_ylabel("advantage")
    spread.bar(columns, uncertainty, color="tab:purple", width=0.7)
    spread.set_ylabel("uncertainty")
    spread.set_xticks(columns, [_visible(token) for token in tokens], fontsize=8, rotation=45 if len(tokens) > 12 else 0)
    spread.set_xlabel("token about to be written")
    return figure


def _visible(token: str) -> str:
    shown = token.replace("\n", "\\n").replace(" ", "␣") or "∅"
    return shown.replace("$", r"\$")


def calibration(returns: np.ndarray, values: np.ndarray, realised: np.ndarray):
    """Are the predicted distributions right? Left: coverage of predicted quantiles; right: realised against predicted mean.

    returns (N, K) sorted samples predicted before the returns `realised` (N,) were seen; values (N,) predicted means.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels, coverage = quantile_coverage(returns, realised)
    left.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    left.plot(levels, coverage, color="tab:blue")
    left.set(xlabel="predicted quantile level", ylabel="share of realised returns below", title="quantiles", xlim=(0, 1), ylim=(0, 1))
    predicted, mean, error, counts = reliability(values, realised)
    span = [min(predicted.min(), mean.min()), max(predicted.max(), mean.max())]
    right.plot(span, span, color="grey", linewidth=1, linestyle="--")
    right.errorbar(predicted, mean, yerr=1.96 * error, fmt="o", color="tab:blue", capsize=2, markersize=4)
    right.set(
        xlabel="predicted value", ylabel="mean realised return", title=f"value, {len(counts)} bins of about {int(counts.mean())} tokens"
    )
    return figure


def quantile_coverage(returns: np.ndarray, realised: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(levels, coverage), both (K,): the share of realised returns (N,) below each predicted quantile of returns (N, K).

    A return that ties with predicted samples takes a random place among them (the randomised probability integral transform), so
    that point masses, which 0/1 rewards always make, can be calibrated too.
    """
    count = returns.shape[1]
    levels = (np.arange(count) + 0.5) / count
    # The predicted distribution function at each realised return: uniform on [0, 1] for a calibrated critic.
    place = np.random.default_rng(0).random(len(realised))
    position = (returns < realised[:, None]).mean(1) + place * (returns == realised[:, None]).mean(1)
    return levels, (position[:, None] <= levels[None]).mean(0)


def reliability(values: np.ndarray, realised: np.ndarray, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(mean predicted value, mean realised return, its standard error, count) of up to `bins` equally full bins of `values` (N,)."""
    order = np.argsort(values, kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    predicted = np.array([values[g].mean() for g in groups])
    mean = np.array([realised[g].mean() for g in groups])
    error = np.array([realised[g].std() / np.sqrt(len(g)) for g in groups])
    return predicted, mean, error, np.array([len(g) for g in groups])
