"""Policy losses: `Entry(config)(PolicyLossInputs) -> LossOutput`, normalised by global counts so that micro-batches add up.

A loss with weights of its own is an `nn.Module`, built as `Entry(config, hidden_size)`; its `learning_rate` is their peak rate.
"""

from dfpo_core.registry import Registry

registry = Registry("train.policy_loss.name", "dfpo_core.policy_losses", {"flowrl": "flowrl", "ppo_clip": "ppo_clip"})
