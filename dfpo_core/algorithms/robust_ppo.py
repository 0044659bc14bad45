"""Robust Bellman PPO: PPO whose value backs up the worst case over an ensemble of critics."""

from dfpo_core.algorithms import registry


@registry.register("robust_ppo")
class RobustPPO:
    """Credit: GAE of V(s) = min over members of V_m(s); every member learns the lambda-return of y_t = r_t + gamma V(s_{t+1}).

    The paper takes the worst case over transition models; the minimum over an ensemble of critics is this project's reading of it.
    """

    critic, critic_options = "ensemble", {}
    advantage, advantage_options = "gae", {}
    policy_loss, policy_loss_options = "ppo_clip", {}
    citation = "Panaganti et al. 2022, Robust Reinforcement Learning using Offline Data, arXiv 2208.05129; as a rival in arXiv 2512.03847"
