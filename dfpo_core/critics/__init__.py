"""Critics: heads on a backbone's hidden states that estimate the return from every token.

Every critic is an `nn.Module` built as `Critic(hidden_size, config)` and used as
    sample_returns(hidden) -> (B, T, K)   return samples, sorted, no gradient
    value(hidden) -> (B, T)               mean return, no gradient
    uncertainty(hidden) -> (B, T)         spread of the return, no gradient
    loss(batch) -> LossOutput             normalised by the global token count: micro-batch losses and metrics add up
    after_step()                          call once after every optimizer step
but for those in GUIDES, which guide a policy and have only the last two.

A flow critic on somebody else's hidden states (an episode of 5 tokens, reward 1 if its first feature is positive, 80 % of the time):

>>> import torch
>>> from dfpo_core.critics.flow import FlowConfig, FlowCritic
>>> from dfpo_core.types import CriticBatch
>>> generator = torch.Generator().manual_seed(0)
>>> _ = torch.manual_seed(0)
>>> critic = FlowCritic(hidden_size=16, config=FlowConfig(return_range=(0, 1)))
>>> optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
>>> for step in range(120):
...     hidden = torch.randn(64, 1, 16, generator=generator).expand(64, 5, 16)    # yours: (batch, tokens, hidden size)
...     won = (hidden[:, 0, 0] > 0) & (torch.rand(64, generator=generator) < 0.8)
...     rewards = torch.zeros(64, 5)
...     rewards[:, -1] = won.float()                                              # reward on the last token
...     mask = torch.ones(64, 5)
...     batch = CriticBatch(hidden, hidden, rewards, mask, float(mask.sum()), critic.sample_returns(hidden), generator)
...     optimizer.zero_grad()
...     critic.loss(batch).loss.backward()
...     optimizer.step()
...     critic.after_step()
>>> values, promising = critic.value(hidden)[:, 0], hidden[:, 0, 0] > 0
>>> bool(values[promising].mean() > values[~promising].mean() + 0.3)
True
>>> critic.sample_returns(hidden).shape, critic.uncertainty(hidden).shape
(torch.Size([64, 5, 32]), torch.Size([64, 5]))
"""

from dfpo_core.registry import Registry

ESTIMATORS = "ensemble", "flow", "multi_quantile", "quantile", "scalar"
GUIDES = ("q_function",)
NAMES = (*ESTIMATORS, *GUIDES)

registry = Registry("train.critic.name", "dfpo_core.critics", {name: name for name in NAMES})
