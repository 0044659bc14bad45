"""Algorithms: named triples of critic, advantage and policy loss. `resolve` turns a TrainConfig into one, with every option checked.

An override may also swap an entry: `train.critic = {"name": "quantile"}` runs the algorithm with another critic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dfpo_core.config import Section, TrainConfig
from dfpo_core.errors import UserError
from dfpo_core.registry import Registry

NAMES = "dfpo", "dr_grpo", "dvpo", "flowrl", "grpo", "ppo", "q_sharp", "reinforce_pp", "reinforce_pp_baseline", "robust_ppo", "sft_only"

registry = Registry("train.algorithm", "dfpo_core.algorithms", {name: name for name in NAMES})


@dataclass(frozen=True)
class Algorithm:
    """Names and validated options of the three parts; `critic_name` is None without a critic, `policy_loss_name` without training."""

    name: str
    critic_name: str | None
    critic_config: Section | None
    advantage_name: str
    advantage_config: Section
    policy_loss_name: str | None
    policy_loss_config: Section | None
    citation: str
    guided: bool = False  # the critic guides the policy: nothing else is trained


def check_name(name: str) -> None:
    """Raise UserError, listing the known names, for an unknown algorithm. Needs no torch."""
    registry.get(name)


def resolve(train: TrainConfig) -> Algorithm:
    """The algorithm that `train` describes. Raises UserError for an unknown name or option and for a combination that makes no sense."""
    from dfpo_core import advantages, critics, policy_losses

    recipe = registry.get(train.algorithm)
    critic_name, critic = _part("critic", critics.registry, recipe.critic, recipe.critic_options, train.critic)
    advantage_name, advantage = _part("advantage", advantages.registry, recipe.advantage, recipe.advantage_options, train.advantage)
    loss_options = {**recipe.policy_loss_options, **_kl_options(train)}
    loss_name, loss = _part("policy_loss", policy_losses.registry, recipe.policy_loss, loss_options, train.policy_loss)
    algorithm = Algorithm(
        train.algorithm, critic_name, critic, advantage_name, advantage, loss_name, loss, recipe.citation, critic_name in critics.GUIDES
    )
    _check_pair(algorithm, train)
    return algorithm


def _part(kind: str, entries: Registry, name: str | None, defaults: dict, overrides: dict) -> tuple[str | None, Any]:
    """Name and validated options of one part; defaults of the recipe hold only while its own entry is used."""
    chosen = overrides.get("name", name)
    if chosen in (None, "none"):
        if set(overrides) - {"name"}:
            what = kind.replace("_", " ")
            raise UserError(f"train.{kind}", f"this algorithm has no {what} to set options of", f"remove train.{kind}, or give it a name")
        return None, None
    if not isinstance(chosen, str):
        raise UserError(f"train.{kind}.name", f"{chosen!r} is not a name", f"choose one of: {', '.join(sorted(entries.names))}")
    config_class = entries.get(chosen).config_class
    options = {key: value for key, value in overrides.items() if key != "name"}
    known = config_class.model_fields
    defaults = {key: value for key, value in defaults.items() if key in known and (chosen == name or kind == "policy_loss")}
    _check_managed(kind, options)
    try:
        return chosen, config_class.model_validate({**defaults, **options})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(["train", kind, *map(str, problem["loc"])])
        if problem["type"] == "extra_forbidden":
            raise UserError(field, f"unknown option of {chosen}", f"known options: {', '.join(known)}") from None
        raise UserError(field, f"{problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}", "correct the value") from None


def _check_managed(kind: str, options: dict) -> None:
    for key in ("kl_weight", "kl_estimator"):
        if kind == "policy_loss" and key in options:
            raise UserError(f"train.policy_loss.{key}", "is set from train.kl_*", "set train.kl_coefficient, kl_in and kl_estimator")


def _kl_options(train: TrainConfig) -> dict[str, Any]:
    in_loss = train.kl_in == "loss"
    return {"kl_weight": train.kl_coefficient, "kl_estimator": train.kl_estimator} if in_loss else {}


def _check_pair(algorithm: Algorithm, train: TrainConfig) -> None:
    """Refuse combinations that would train on nothing, or silently ignore an option."""
    if algorithm.advantage_name is None:
        raise UserError("train.advantage.name", "only the critic can be left out", "name an entry")
    options = algorithm.advantage_config
    baseline = getattr(options, "critic_baseline", False) or getattr(options, "baseline", "") == "critic"
    needs_critic = algorithm.advantage_name == "gae" or baseline
    if algorithm.guided:
        return _check_guided(algorithm, train, needs_critic)
    _check_policy_loss(algorithm, train)
    if needs_critic and algorithm.critic_name is None:
        reader = "a critic baseline" if baseline else f"the {algorithm.advantage_name} advantage"
        raise UserError("train.critic.name", f"{reader} needs a critic", "name a critic, or use the group advantage")
    if not needs_critic and algorithm.critic_name is not None:
        raise UserError(
            "train.critic.name",
            f"the {algorithm.advantage_name} advantage does not read a critic, so training one would change nothing",
            "use the gae advantage or a critic baseline, or leave the critic out",
        )
    if algorithm.policy_loss_name == "flowrl" and needs_critic:
        raise UserError("train.critic.name", "flowrl's log Z is its baseline", "leave the critic out, or use another policy loss")
    grouped = algorithm.advantage_name == "group" or getattr(options, "group_baseline", False) or getattr(options, "prompt_effect", False)
    if grouped and train.samples_per_prompt < 2:
        raise UserError(
            "train.samples_per_prompt", "a response without others to its prompt has nothing to compare with", "set it to 2 or more"
        )
    if algorithm.advantage_name == "group" and train.kl_coefficient and train.kl_in == "reward":
        raise UserError("train.kl_in", "the group advantage reads sequence rewards only and would ignore the KL", "set kl_in to loss")
    spectrum = getattr(options, "spectrum", "uniform")
    mean_only = algorithm.critic_name == "scalar" or getattr(algorithm.critic_config, "member", "") == "scalar"
    if mean_only and spectrum != "uniform":
        problem = f"{spectrum} needs a distribution, {algorithm.critic_name} has only a mean"
        raise UserError("train.advantage.spectrum", problem, "use the flow critic")
    discount = getattr(options, "discount", 1.0)  # the group advantage does not discount
    if needs_critic and algorithm.critic_config.discount != discount:
        raise UserError("train.advantage.discount", "differs from train.critic.discount", "use one discount in both")


def _check_guided(algorithm: Algorithm, train: TrainConfig, needs_critic: bool) -> None:
    """A critic that guides trains alone: no policy loss, no advantage that reads it, no KL but its own."""
    name = algorithm.critic_name
    if algorithm.policy_loss_name is not None:
        raise UserError("train.policy_loss.name", f"{name} guides the policy, whose weights stay as they are", "use algorithm q_sharp")
    if needs_critic:
        problem = f"the advantage needs a value, and {name} knows only tokens"
        raise UserError("train.advantage.name", problem, "use reinforce_pp: the advantage is only logged")
    if train.rollout_engine == "vllm":
        raise UserError("train.rollout_engine", f"{name} samples with two models at once", "use hf")
    if train.kl_coefficient:
        raise UserError("train.kl_coefficient", f"{name} weighs the KL itself", "set it to 0 and train.critic.eta instead")
    if train.critic_layers:
        raise UserError("train.critic_layers", f"{name} begins as the whole reference policy", "use 0, which copies all")


def _check_policy_loss(algorithm: Algorithm, train: TrainConfig) -> None:
    """Leaving out the policy loss means no training at all; a loss must use, or refuse, the KL and the advantage that it is given."""
    name, config = algorithm.policy_loss_name, algorithm.policy_loss_config
    if name is None:
        if train.algorithm != "sft_only":
            raise UserError("train.policy_loss.name", "only the critic can be left out", "name an entry, or use algorithm sft_only")
        if algorithm.critic_name is not None:
            raise UserError("train.critic.name", "sft_only trains nothing, a critic neither", "leave the critic out")
        return
    if train.kl_coefficient and "kl_weight" not in type(config).model_fields:
        raise UserError("train.kl_coefficient", f"{name} already compares with the reference policy in its residual", "set it to 0")
    if name == "flowrl" and train.rollout_engine == "vllm" and train.importance_cap:
        raise UserError("train.importance_cap", "flowrl weighs whole responses, not tokens", "set it to 0, or use rollout_engine hf")
    if name == "flowrl" and algorithm.advantage_name != "group":
        raise UserError("train.advantage.name", "flowrl takes the group-normalised reward as r", "use the group advantage")
