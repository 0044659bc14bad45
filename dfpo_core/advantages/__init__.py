"""Advantage estimators: `Entry(config)(AdvantageInputs) -> AdvantageOutput`."""

from dfpo_core.registry import Registry

registry = Registry("train.advantage.name", "dfpo_core.advantages", {"gae": "gae", "group": "group", "reinforce_pp": "reinforce_pp"})
