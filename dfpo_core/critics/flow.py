"""The value flow: a critic that turns noise into samples of the return, in one step (DFPO, arXiv 2602.05890).

The return Z(s_t) is the end point of dz/dtau = v(z, tau, d | h_t) from z(0) = eps ~ N(0, 1); d is the step size the solver takes.
The instantaneous field d = 0 is learned by flow matching, the jump d = 1 from it by geometric consistency. Why not the field
alone: its optimum at tau = 0 is v(eps, 0, 0) = E[Z] - eps, so one Euler step of it gives the exact mean and no spread at all. That is
why `value` reads the mean off the field, and `sample_returns` reads the shape off the jump.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dfpo_core.config import Section
from dfpo_core.critics import confidence, flow_losses, registry
from dfpo_core.critics.bootstrap import lambda_returns, sampled_horizons, sampled_lambda_returns
from dfpo_core.types import CriticBatch, LossOutput, last_token

START_SHARE = 0.25  # of the flow times drawn
FREQUENCIES = 4  # cosines each of flow time and step size; sines and cosines of the position
FIELD_STEPS = 8  # Euler steps of the field where its spread is read
RAMPS, RAMP_LIMIT = 12, 2.2  # steep features of the position, evenly over [-RAMP_LIMIT, RAMP_LIMIT]


class FlowConfig(Section):
    """Options of the flow critic. A weight of 0 switches a term off: it is then not computed.

    22 of 29 variants were above these weights, weighting and steps in the ablation's three seeds, eight clearly. Tried again on other seeds
    and more kinds of noise, none was clearly above and most were below: these stay (tests/benchmarks/results/robustness: ablation,
    tuning_flow).
    """

    width: int = Field(64, ge=8, description="hidden width of the head")
    noise_levels: int = Field(32, ge=2, description="K: stratified noise levels of sample_returns")
    loss_levels: int = Field(16, ge=2, description="(noise, flow time) pairs a token in the losses")
    return_range: tuple[float, float] = Field((0.0, 1.0), description="returns expected; the head works in units that map it to [-1, 1]")
    discount: float = Field(1.0, gt=0, le=1, description="gamma")
    lam: float = Field(0.95, ge=0, le=1, description="lambda_c of the bootstrapped targets")
    confidence: bool = Field(False, description="read the policy's log-probabilities and entropy beside the hidden states")
    lambda_mixing: Literal["sampled", "average"] = Field("sampled", description="how return samples are mixed over bootstrap times")
    solver_steps: int = Field(1, ge=1, description="Euler steps of every return sample: 1 is the one-step map that the critic is for")
    value_step_size: Literal[0, 1] = Field(0, description="d of the mean used as value: 0 the field, 1 the one-step samples")
    target_decay: float = Field(0.5, ge=0, lt=1, description="EMA decay of the target head, an optimizer step")
    anchor_weight: float = Field(1.0, ge=0, description="loss 1: bootstrapped anchor")
    bellman_weight: float = Field(0.3, ge=0, description="loss 2: uncertainty-weighted distributional flow matching")
    # On enumerated trees 1 step and 4 end at the same distances (flow_tree.py --compare bellman_steps 1 4), and 1 saves a fifth of the
    # loss's time.
    bellman_steps: int = Field(1, ge=1, description="Euler steps of the target flow in loss 2")
    # On enumerated trees with noisy rewards the three end within 0.001 of each other in W1, less than seeds differ: a draw
    # (tests/benchmarks/results/flow_weighting.json).
    weighting: Literal["none", "confidence", "robust"] = Field("robust", description="weight of loss 2 by uncertainty")
    weighting_scale: float = Field(1.0, gt=0, description="temperature T of confidence, sigma_0 of robust, in half return ranges")
    consistency_weight: float = Field(5.0, ge=0, description="loss 3: geometric consistency")
    # At d = 1 loss 3 pulls the jump towards two half steps in proportion to the distance, and the quantile loss back with its square:
    # where the half steps blur a tail, or stand a little off, the jump follows. 0.5 leaves the jump to the quantile loss.
    consistency_largest: Literal[1.0, 0.5] = Field(1.0, description="largest step size of loss 3; 0.5 needs the jump loss")
    consistency_halvings: int = Field(4, ge=1, le=8, description="smallest step size of loss 3 is 2^-halvings")
    jump_weight: float = Field(3.0, ge=0, description="quantile loss of the one-step samples, beside loss 3")
    # arcsine finds extreme quantiles in fewer updates (heavy tails: tests/benchmarks/flow_faithful.py) and the middle ones in more.
    jump_levels: Literal["uniform", "arcsine"] = Field("uniform", description="how the levels of the jump loss are spread over (0, 1)")
    straight_weight: float = Field(0.0, ge=0, description="straightness penalty, the paper's form of loss 3")
    risk_alpha: float = Field(0.1, gt=0, lt=1, description="alpha of every tail")
    risk_lower_weight: float = Field(0.0, ge=0, description="loss 4: lower CVaR")
    risk_upper_weight: float = Field(0.0, ge=0, description="loss 4: upper CVaR")
    lower_shape_weight: float = Field(0.0, ge=0, description="loss 5: lower-tail contraction")
    upper_shape_weight: float = Field(0.0, ge=0, description="loss 5: upper-tail expansion")
    lower_shape_limit: float = Field(1.5, ge=0, description="kappa_lo: tail depth allowed, in standard deviations of the target's field")
    upper_shape_limit: float = Field(1.5, ge=0, description="kappa_hi: tail height asked for, in standard deviations of the target's field")
    curvature_weight: float = Field(0.0, ge=0, description="loss 5: squared second difference of the sorted samples")

    @model_validator(mode="after")
    def _trains_something(self):
        if self.return_range[0] >= self.return_range[1]:
            raise ValueError("return_range must be increasing")
        if self.anchor_weight == self.bellman_weight == 0:
            raise ValueError("anchor_weight and bellman_weight cannot both be 0")
        if self.consistency_largest == 0.5 and self.consistency_weight > 0 and self.jump_weight == 0:
            raise ValueError("consistency_largest 0.5 leaves the jump to jump_weight, which cannot be 0")
        return self


def stratified_noise(count: int, jitter: Tensor | float = 0.5) -> Tensor:
    """Phi^-1((k - 1 + jitter) / K) for k = 1..K: (K,) increasing noise levels, float32; jitter 1/2 gives the stratum medians."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + jitter) / count).float()


class FlowHead(nn.Module):
    """v(z, tau, d | h): embeddings of z, tau and d, scaled and shifted by h, two hidden layers, zero-initialised output.

    The velocity of a flow between two standard normals is added in closed form, so the untrained head is the exact flow to N(0, 1)
    at every step size, and the field's own optimum at tau = 0, E[Z] - eps, is a constant of eps for the network.
    h scales (FiLM, Perez et al. 2018) as well as shifts, and the position has steep features, because the jump to a discrete return is
    a staircase in eps whose steps stand where h says (tests/benchmarks/flow_faithful.py).
    """

    def __init__(self, hidden_size: int, width: int, extra: int = 0):
        super().__init__()
        self.extra = extra  # features of `confidence` behind each hidden state
        self.project = nn.Linear(hidden_size + extra, 2 * width)
        self.embed_position = nn.Linear(1 + 2 * FREQUENCIES + RAMPS, width, bias=False)
        self.embed_step = nn.Linear(2 * FREQUENCIES, width, bias=False)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def context(self, hidden: Tensor) -> Tensor:
        """Once per token: (.., H + extra) -> (.., 1, 2 width), shift and scale."""
        return self.project(confidence.normalised(hidden, self.extra))[..., None, :]

    def forward(self, context: Tensor, position: Tensor, flow_time: Tensor, step_size: Tensor) -> Tensor:
        """context (.., 1, 2 width), position (.., S), or (S,) the same for all, flow_time (S,), step_size (S,) -> velocity (.., S)."""
        shift, scale = context.chunk(2, -1)
        embedding = self.embed_position(position_features(position)) + self.embed_step(step_features(flow_time, step_size))
        x = F.silu(torch.addcmul(shift, embedding, 1 + scale))
        x = F.silu(self.second(F.silu(self.first(x))))
        return self.out(x).squeeze(-1) + position * gaussian_rate(flow_time, step_size)

    def jump(self, context: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Z = eps + v(eps, 0, 1) and its forward-mode derivative dZ/deps: noise (S,) -> two (.., S). Without gradient.

        The tangent goes through the layers beside the value. torch.func.jvp computes the same and takes twice as long: silu has no fused
        rule there, and on few tokens its rules for features are most of the time.
        """
        shift, scale = context.chunk(2, -1)
        still = torch.zeros_like(noise)
        embedding = self.embed_position(position_features(noise)) + self.embed_step(step_features(still, still + 1))
        before = torch.addcmul(shift, embedding, 1 + scale)
        x, tangent = F.silu(before), silu_tangent(self.embed_position(position_slopes(noise)) * (1 + scale), before)
        for layer in (self.first, self.second):
            before = layer(x)
            x, tangent = F.silu(before), silu_tangent(F.linear(tangent, layer.weight), before)
        rate = 1 + gaussian_rate(still, still + 1)
        return self.out(x).squeeze(-1) + rate * noise, F.linear(tangent, self.out.weight).squeeze(-1) + rate


def position_features(position: Tensor) -> Tensor:
    """The position, its sines and cosines, and ramps from -1 to 1 that stand side by side: (.., S) -> (.., S, features)."""
    angle, ramps = position[..., None] * frequencies(position), ramps_of(position)
    return torch.cat([position[..., None], angle.sin(), angle.cos(), ramps.clamp(-1, 1)], -1)


def position_slopes(position: Tensor) -> Tensor:
    """The derivative of `position_features`: (.., S) -> (.., S, features)."""
    frequency, ramps = frequencies(position), ramps_of(position)
    angle, rising = position[..., None] * frequency, (ramps.abs() <= 1) * ((RAMPS - 1) / (2 * RAMP_LIMIT))
    return torch.cat([torch.ones_like(position[..., None]), frequency * angle.cos(), -frequency * angle.sin(), rising], -1)


def frequencies(position: Tensor) -> Tensor:
    return torch.arange(1, FREQUENCIES + 1, device=position.device)


def ramps_of(position: Tensor) -> Tensor:
    """Straight lines through 0 at RAMPS centres: (.., S) -> (.., S, RAMPS)."""
    centres = torch.linspace(-RAMP_LIMIT, RAMP_LIMIT, RAMPS, device=position.device, dtype=position.dtype)
    return (position[..., None] - centres) * (RAMPS - 1) / (2 * RAMP_LIMIT)


def step_features(flow_time: Tensor, step_size: Tensor) -> Tensor:
    """Cosines of the flow time and of the logarithm of the step size: two (S,) -> (S, features)."""
    frequency = math.pi * torch.arange(1, FREQUENCIES + 1, device=flow_time.device)
    level = torch.log2(1 + 31 * step_size) / 5  # spreads the dyadic step sizes evenly over [0, 1]
    return torch.cat([(flow_time[:, None] * frequency).cos(), (level[:, None] * frequency).cos()], -1)


def silu_tangent(tangent: Tensor, before: Tensor) -> Tensor:
    """tangent times the derivative of silu at `before`: forward and backward mode need the same product of an elementwise function."""
    return torch.ops.aten.silu_backward(tangent, before)


def gaussian_rate(flow_time: Tensor, step_size: Tensor) -> Tensor:
    """Mean velocity over [tau, tau + d] of the flow from N(0,1) to an independent N(0,1), per unit of position; d = 0: the limit."""
    scale = (flow_time.square() + (1 - flow_time).square()).sqrt()
    end = flow_time + step_size
    end_scale = (end.square() + (1 - end).square()).sqrt()
    finite = (end_scale / scale - 1) / step_size.clamp(min=1e-6)
    return torch.where(step_size > 0, finite, (2 * flow_time - 1) / scale.square())


@registry.register("flow")
class FlowCritic(nn.Module):
    """Distributional critic by a one-step flow. Everything inside is fp32 and in units where `return_range` is [-1, 1]."""

    config_class = FlowConfig

    def __init__(self, hidden_size: int, config: FlowConfig):
        super().__init__()
        self.config = config
        self.extra = confidence.FEATURES * config.confidence
        self.head = FlowHead(hidden_size, config.width, self.extra)
        self.target_head = copy.deepcopy(self.head).requires_grad_(False)
        low, high = config.return_range
        self.shift, self.scale = (low + high) / 2, (high - low) / 2
        self.register_buffer("noise", stratified_noise(config.noise_levels), persistent=False)

    # -- reading the distribution ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_returns(self, hidden: Tensor, steps: int = 0) -> Tensor:
        """Sorted return samples at the K stratified noise levels by `steps` (0: solver_steps) Euler steps of d = 1 / steps: (B, T, K)."""
        with full_precision(hidden):
            samples = solve(self._velocity(self.head, hidden), self.noise, steps or self.config.solver_steps)
            return (self.shift + self.scale * samples).sort(-1).values

    @torch.no_grad()
    def value(self, hidden: Tensor) -> Tensor:
        """Mean return E[eps + v(eps, 0, d)], d = `value_step_size`: (B, T). Exact in one evaluation for the field, d = 0."""
        with full_precision(hidden):
            velocity, still = self._velocity(self.head, hidden), torch.zeros_like(self.noise)
            samples = self.noise + velocity(self.noise, still, still + self.config.value_step_size)
            return self.shift + self.scale * samples.mean(-1)

    @torch.no_grad()
    def uncertainty(self, hidden: Tensor) -> Tensor:
        """sigma = mean over eps of |dZ/deps| of the one-step map, by forward-mode differentiation: (B, T), in units of the return.

        Equals the standard deviation of a Gaussian return; for any return it is the Gaussian-weighted total variation of Z(eps).
        """
        with full_precision(hidden):
            return self.scale * dispersion(self.head.jump(self.head.context(hidden), self.noise)[1])

    def _velocity(self, head: FlowHead, hidden: Tensor) -> flow_losses.Velocity:
        return bound(head, head.context(hidden))

    # -- learning it -------------------------------------------------------------------------------------------------------

    def loss(self, batch: CriticBatch) -> LossOutput:
        """Weighted sum of the enabled losses over valid tokens / token_count, in units of (half the return range)^2.

        The random (noise, flow time, step size, horizon) levels are drawn once a call and shared by all tokens (stratified), so with
        generators in the same state the losses of micro-batches add up to the batch's, whatever the padding and order. Only the N
        valid tokens are computed, packed row by row: each token's successor is the next one, up to its row's last.
        """
        config, valid = self.config, batch.mask > 0
        with full_precision(batch.hidden):
            levels = draw_levels(config.loss_levels, batch.generator, batch.hidden.device)
            velocity = self._velocity(self.head, batch.hidden[valid])
            with torch.no_grad():
                context = self.target_head.context(batch.target_hidden[valid])
                target_velocity, following = bound(self.target_head, context), bound(self.target_head, context.roll(-1, 0))
                own, slope = self.target_head.jump(context, levels.noise)
                if config.solver_steps > 1:
                    own = solve(target_velocity, levels.noise, config.solver_steps)
                rewards = self._scaled_rewards(batch.token_rewards, batch.mask)
                bootstrap = own.new_zeros(*batch.mask.shape, config.loss_levels).index_put((valid,), own)
                target = self._targets(rewards, bootstrap, batch.mask, levels)[valid]
            terms = self._flow_terms(velocity, target_velocity, target, levels)
            if config.bellman_weight:
                weight = (1 - last_token(batch.mask)[valid]) * self._certainty(dispersion(slope))
                terms["bellman"] = config.bellman_weight, self._bellman(velocity, following, rewards[valid], weight, levels)
            terms |= self._tail_terms(velocity, target_velocity, target)
            losses = {name: term.sum() / batch.token_count for name, (_, term) in terms.items()}
            loss = sum(weight * losses[name] for name, (weight, _) in terms.items())
        metrics = {f"critic/{name}_loss": value.item() for name, value in losses.items()}
        outside = ((target < -1.1) | (target > 1.1)).float().mean(-1).sum() / batch.token_count
        metrics |= {"critic/loss": loss.item(), "critic/outside_range": outside.item()}
        return LossOutput(loss, metrics)

    def _scaled_rewards(self, token_rewards: Tensor, mask: Tensor) -> Tensor:
        """Rewards for which the Bellman recursion holds in the head's units; the last token has no shifted return to add."""
        shifted = token_rewards + (self.config.discount * (1 - last_token(mask)) - 1) * self.shift
        return torch.where(mask > 0, shifted / self.scale, torch.zeros_like(shifted))

    def _targets(self, rewards: Tensor, bootstrap: Tensor, mask: Tensor, levels: Levels) -> Tensor:
        if self.config.lambda_mixing == "average":
            return lambda_returns(rewards, bootstrap, mask, self.config.discount, self.config.lam)
        horizons = sampled_horizons(levels.horizon, self.config.lam)
        return sampled_lambda_returns(rewards, bootstrap, mask, self.config.discount, horizons)

    def _flow_terms(self, velocity, target_velocity, target, levels) -> dict[str, tuple[float, Tensor]]:
        """Losses 1 and 3: name -> (weight, per-token loss (N,))."""
        config, terms = self.config, {}
        if config.anchor_weight:
            terms["anchor"] = config.anchor_weight, flow_losses.anchor(velocity, levels.noise, levels.flow_time, target)
        if config.consistency_weight:
            step_size, flow_time, smallest = consistency_grid(levels, config.consistency_largest, config.consistency_halvings)
            position = (1 - flow_time) * levels.noise + flow_time * target
            consistency = flow_losses.geometric_consistency(velocity, target_velocity, position, flow_time, step_size, smallest)
            terms["consistency"] = config.consistency_weight, consistency
        if config.jump_weight:
            # Not the levels of the target's samples, but those that choose the step sizes of loss 3, which does not look at the jump loss.
            noise = levels.noise if config.jump_levels == "uniform" else arcsine_noise(levels.step)
            terms["jump"] = config.jump_weight, flow_losses.jump_quantiles(one_step(velocity, noise), noise, target)
        if config.straight_weight:
            terms["straight"] = config.straight_weight, flow_losses.straightness(velocity, levels.noise, levels.flow_time, target)
        return terms

    def _certainty(self, sigma: Tensor) -> Tensor:
        """Weight of loss 2 by the dispersion of the token's own target flow: (N,) -> (N,)."""
        if self.config.weighting == "none":
            return torch.ones_like(sigma)
        weigh = flow_losses.confidence_weight if self.config.weighting == "confidence" else flow_losses.robust_weight
        return weigh(sigma, self.config.weighting_scale)

    def _bellman(self, velocity, following, rewards, weight, levels) -> Tensor:
        """Loss 2, (N,); `weight` must be 0 on the last token of each row, which has nothing to bootstrap from."""
        config, path = self.config, flow_losses.bellman_path
        with torch.no_grad():
            image, moving = path(following, levels.noise, levels.flow_time, rewards, config.discount, config.bellman_steps)
        return flow_losses.distributional_flow_matching(velocity, image, levels.flow_time, moving, weight)

    def _tail_terms(self, velocity, target_velocity, target) -> dict[str, tuple[float, Tensor]]:
        """Losses 4 and 5 on the K one-step samples: name -> (weight, per-token loss (N,))."""
        config, terms = self.config, {}
        risk = config.risk_lower_weight, config.risk_upper_weight
        if not any((*risk, config.lower_shape_weight, config.upper_shape_weight, config.curvature_weight)):
            return terms
        samples = one_step(velocity, self.noise).sort(-1).values
        with torch.no_grad():
            own = one_step(target_velocity, self.noise).sort(-1).values
        if any(risk):
            targets = flow_losses.tail_targets(target, own, config.risk_alpha)
            terms["risk"] = 1.0, flow_losses.conditional_value_risk(samples, targets, config.risk_alpha, risk)
        # The shape is judged by the field's spread. These terms do not train the field; measured by the jump's own spread, a tail that
        # is pulled out would raise its own limit.
        with torch.no_grad():
            field = solve(lambda position, flow_time, _: target_velocity(position, flow_time, 0 * flow_time), self.noise, FIELD_STEPS)
        spread = field.std(-1, correction=0)
        if config.lower_shape_weight:
            shape = flow_losses.lower_contraction(samples, config.risk_alpha, config.lower_shape_limit * spread)
            terms["lower_shape"] = config.lower_shape_weight, shape
        if config.upper_shape_weight:
            shape = flow_losses.upper_expansion(samples, config.risk_alpha, config.upper_shape_limit * spread)
            terms["upper_shape"] = config.upper_shape_weight, shape
        if config.curvature_weight:
            terms["curvature"] = config.curvature_weight, flow_losses.curvature(samples)
        return terms

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the target head towards the head: target <- decay target + (1 - decay) head."""
        for target, online in zip(self.target_head.parameters(), self.head.parameters(), strict=True):
            target.lerp_(online, 1 - self.config.target_decay)


def bound(head: FlowHead, context: Tensor) -> flow_losses.Velocity:
    """The head as a velocity field of the tokens that `context` describes."""
    return lambda position, flow_time, step_size: head(context, position, flow_time, step_size)


class Levels:
    """Random levels of one loss call, (S,) each: noise, flow time in [0, 1), a uniform for the bootstrap horizon and one for d."""

    def __init__(self, noise: Tensor, flow_time: Tensor, horizon: Tensor, step: Tensor):
        self.noise, self.flow_time, self.horizon, self.step = noise, flow_time, horizon, step


def draw_levels(count: int, generator: torch.Generator | None, device: torch.device) -> Levels:
    """One jittered point in each of `count` strata, for each quantity, paired at random (a Latin hypercube).

    START_SHARE of the flow times is the point 0, where `value` reads the field: the mean is what advantages stand on.
    """
    place = generator.device if generator else torch.device("cpu")
    jitter = torch.rand(4, count, generator=generator, device=place).double()
    order = torch.rand(4, count, generator=generator, device=place).argsort(1)
    uniform = ((order + jitter) / count).clamp(1e-6, 1 - 1e-6)
    uniform[1] = ((uniform[1] - START_SHARE) / (1 - START_SHARE)).clamp(min=0)
    noise = torch.special.ndtri(uniform[0])
    return Levels(*(x.float().to(device) for x in (noise, uniform[1], uniform[2], uniform[3])))


def arcsine_noise(uniform: Tensor) -> Tensor:
    """Noise at levels of the arcsine law, Beta(1/2, 1/2), whose density rises towards 0 and 1: uniform levels (S,) -> (S,)."""
    return torch.special.ndtri((uniform.double() * math.pi / 2).sin().square().clamp(1e-6, 1 - 1e-6)).to(uniform.dtype)


def consistency_grid(levels: Levels, largest: float, halvings: int) -> tuple[Tensor, Tensor, float]:
    """Step sizes d in {largest, .., 1/4, .., 2^-halvings} and flow times on the grid of multiples of d, both (S,), and the smallest d."""
    first = int(largest == 0.5)
    step_size = 0.5 ** (first + (levels.step * (halvings + 1 - first)).floor())
    return step_size, (levels.flow_time / step_size).floor() * step_size, 0.5**halvings


def one_step(velocity: flow_losses.Velocity, noise: Tensor) -> Tensor:
    """Z = eps + v(eps, 0, 1): noise (S,) -> (.., S)."""
    still = torch.zeros_like(noise)
    return noise + velocity(noise, still, still + 1)


def solve(velocity: flow_losses.Velocity, noise: Tensor, steps: int) -> Tensor:
    """Euler solution at tau = 1 in `steps` steps of d = 1 / steps: noise (S,) -> (.., S)."""
    position, flow_time = noise, torch.zeros_like(noise)
    for i in range(steps):
        position = position + velocity(position, flow_time + i / steps, torch.full_like(flow_time, 1 / steps)) / steps
    return position


def dispersion(slope: Tensor) -> Tensor:
    """Mean over S of |dZ/deps|: (.., S) -> (..)."""
    return slope.abs().mean(-1)


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context in which autocast is off: returns of 0 and 1 do not fit in bf16's 8 bits once bootstrapped."""
    return torch.autocast(tensor.device.type, enabled=False)
