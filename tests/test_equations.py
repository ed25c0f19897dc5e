"""Every loss, rule and update of ampl.py against numbers worked out by hand."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ampl

CPU = torch.device("cpu")
LN2 = 0.6931472


def tiny(**changes) -> ampl.Args:
    """Arguments small enough for a test."""
    sizes = dict(
        hidden=(8, 8), noise_dim=2, batch_size=16, buffer_size=64, rollout_rows=24, horizon=3,
        ensemble_size=3, num_elites=2, model_hidden=8, model_batch_size=4, miw_batch_size=8,
        miw_initial_batch_size=8, model_epoch_steps=5, cuda=False,
    )  # fmt: skip
    return ampl.Args(**(sizes | changes))


def rule_for(obs_dim: int, known=None) -> ampl.TerminationRule:
    """A termination rule whose ranges are never left."""
    never = ampl.known_termination("door-expert-v1")[0]
    return ampl.TerminationRule(known or never, torch.full((obs_dim,), 1e9), torch.tensor(1e9))


def random_data(rows: int, obs_dim: int = 3, action_dim: int = 2, seed: int = 0) -> torch.Tensor:
    """Rows of Batch's fields [rows, C]; no terminals."""
    g = torch.Generator().manual_seed(seed)
    columns = [
        torch.randn(rows, obs_dim, generator=g),
        torch.rand(rows, action_dim, generator=g) * 1.8 - 0.9,
        torch.rand(rows, 1, generator=g),
        torch.randn(rows, obs_dim, generator=g),
        torch.zeros(rows, 1),
    ]
    return torch.cat(columns, -1)


def dataset_of(data: torch.Tensor, obs_dim: int, action_dim: int) -> SimpleNamespace:
    """What fit_model, data_rows and termination_rule read of a Dataset."""
    sizes = [obs_dim, action_dim, 1, obs_dim, 1]
    obs, action, reward, next_obs, terminated = data.split(sizes, -1)
    return SimpleNamespace(
        obs=obs, action=action, reward=reward[:, 0], next_obs=next_obs,
        terminated=terminated[:, 0], has_next=torch.ones(len(data), dtype=torch.bool),
    )  # fmt: skip


class StubRun:
    """Takes the place of the run folder."""

    def __init__(self):
        self.progress = {}

    def after_steps(self, *_):
        pass

    def log(self, *_):
        pass


def parameters_of(module: nn.Module, learner: int | None = None) -> list[torch.Tensor]:
    """Copies of all parameters, of one learner if asked."""
    chosen = [p if learner is None else p[learner] for p in module.parameters()]
    return [p.detach().clone() for p in chosen]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


# --- critic, Eq. (12) and (13) ---


def test_conservative_target():
    """Eq. (12): 1 + 0.9 (0.75 * 2 + 0.25 * 4) = 3.25; none at terminals, none beyond the bound."""
    reward = torch.ones(1, 4)
    terminated = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    q_next = torch.tensor([[[2.0, 2.0, 40.0, -40.0], [4.0, 4.0, 10.0, -10.0]]])
    target = ampl.conservative_target(reward, terminated, q_next, 0.9, 0.75, 2000.0)
    # 0.75 * 10 + 0.25 * 40 = 17.5 and 0.75 * -40 + 0.25 * -10 = -32.5
    assert target.tolist()[0] == pytest.approx([3.25, 1.0, 16.75, -28.25])
    target = ampl.conservative_target(reward, terminated, q_next, 0.9, 0.75, 17.5)
    assert target.tolist()[0] == pytest.approx([3.25, 1.0, 1.0, 1.0])


def test_critic_loss():
    """Eq. (13): mean over rows, sum over critics; linear beyond delta."""
    q = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    target = torch.tensor([[0.0, 4.0]])
    # Squares: (0.5 + 2) / 2 + (0 + 8) / 2. Delta 1: (0.5 + 1.5) / 2 + (0 + 3.5) / 2.
    assert ampl.critic_loss(q, target, 500.0).tolist() == pytest.approx([5.25])
    assert ampl.critic_loss(q, target, 1.0).tolist() == pytest.approx([2.75])


def test_learners_keep_their_own_losses():
    """Two learners in one call give the two single losses."""
    q = torch.tensor([[[1.0], [1.0]], [[3.0], [0.0]]])
    assert ampl.critic_loss(q, torch.zeros(2, 1), 500.0).tolist() == pytest.approx([1.0, 4.5])


def test_twin_critic_first_is_head_one():
    """`first` is row 0 of the full forward pass."""
    agent = ampl.AMPL(tiny(num_seeds=2), 3, 2, CPU)
    obs, action = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    both = agent.critic(obs, action)
    assert both.shape == (2, 2, 5)
    torch.testing.assert_close(agent.critic.first(obs, action), both[:, 0])


# --- policy and discriminator, Eq. (14) to (17) ---


def test_masked_mean():
    """(1 + 3) / 2 with the middle row dropped; no rows at all give 0, not NaN."""
    values = torch.tensor([[1.0, 100.0, 3.0], [5.0, 6.0, 7.0]])
    keep = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert ampl.masked_mean(values, keep).tolist() == [2.0, 0.0]


def test_generator_loss():
    """Eq. (15), non-saturating: -log D with D = 3/4 and 1/2 is 0.2876821 and 0.6931472."""
    logit = torch.tensor([[math.log(3), 0.0, -50.0]])
    keep = torch.tensor([[1.0, 1.0, 0.0]])
    assert ampl.generator_loss(logit, keep).tolist() == pytest.approx([0.4904147])


def test_discriminator_loss():
    """Eq. (16): D(true) = 3/4 with label 0.8, D(fake) = 1/4, a dropped row, and half the sum."""
    # -(0.8 log 0.75 + 0.2 log 0.25) = 0.5074045 and -log 0.75 = 0.2876821
    true, fake = torch.tensor([[math.log(3)]]), torch.tensor([[-math.log(3), 9.0]])
    keep, label = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8]])
    assert ampl.discriminator_loss(true, fake, keep, label).tolist() == pytest.approx([0.3975433])


def test_policy_loss():
    """Eq. (17): lambda = 10 / 4, so -2.5 * mean(1, 3) + 0.5 = -4.5."""
    loss = ampl.policy_loss(
        torch.tensor([[1.0, 3.0]]), torch.tensor([4.0]), torch.tensor([0.5]), 10.0
    )
    assert loss.tolist() == pytest.approx([-4.5])


def test_discriminator_learns_the_log_density_ratio():
    """With labels 1 the best logit is log p_true / p_fake: 2a for N(1, 1) against N(-1, 1).

    Tolerance: 0.3 on average over a in [-1.5, 1.5], where the truth runs from -3 to 3.
    """
    torch.manual_seed(0)
    net = ampl.Discriminator(1, 1, 1, tiny(hidden=(16, 16)))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    obs, ones = torch.zeros(1, 1024, 1), torch.ones(1, 1024)
    for _ in range(300):
        true = net(obs, torch.randn(1, 1024, 1) + 1)
        fake = net(obs, torch.randn(1, 1024, 1) - 1)
        optimizer.zero_grad()
        ampl.discriminator_loss(true, fake, ones, ones).sum().backward()
        optimizer.step()
    a = torch.linspace(-1.5, 1.5, 31)
    logit = net(torch.zeros(1, 31, 1), a.view(1, 31, 1))[0]
    assert (logit - 2 * a).abs().mean() < 0.3


def test_true_pairs_are_finite_at_the_bounds():
    """atanh of actions at +-1 is clipped, and inner actions come back through tanh."""
    agent = ampl.AMPL(tiny(), 3, 2, CPU)
    data = random_data(4)
    data[:, 3:5] = torch.tensor([1.0, -0.5])
    data[:2, 3] = -1.0
    obs, raw = ampl.true_pairs(agent, data, 32)
    assert obs.shape == (1, 32, 3) and raw.shape == (1, 32, 2)
    assert raw.isfinite().all() and raw[..., 0].abs().min() > 8
    assert raw[..., 1].unique().tolist() == pytest.approx([-0.5493061])


def test_fake_pairs():
    """Eq. (14): both raw actions carry gradient, s' does not; a terminal s' loses its own pair."""
    agent = ampl.AMPL(tiny(), 3, 2, CPU)
    obs = torch.arange(12.0).view(1, 4, 3)
    agent.elites.sample = lambda obs, action: (torch.zeros(1, 4), obs + 100)
    known = lambda s: s[..., 0] == 106  # noqa: E731  the third row
    pairs, raw, keep = ampl.fake_pairs(agent, obs, rule_for(3, known))
    assert torch.equal(pairs, torch.cat([obs, obs + 100], 1)) and not pairs.requires_grad
    assert keep.tolist() == [[1, 1, 1, 1, 1, 1, 0, 1]]
    for half in (raw[:, :4], raw[:, 4:]):
        grads = torch.autograd.grad(half.sum(), list(agent.actor.parameters()), retain_graph=True)
        assert all(g.abs().sum() > 0 for g in grads)


def test_policy_noise_is_clamped():
    """Noise of deviation 50 arrives at the network within [-3, 3], deviation 1e-3 small."""
    policy = ampl.ImplicitPolicy(1, 3, 2, tiny(noise_std=50.0))
    seen = []
    policy.net.register_forward_pre_hook(lambda _, x: seen.append(x[0][..., 3:]))
    policy(torch.zeros(1, 200, 3))
    assert seen[0].shape == (1, 200, 2)
    assert seen[0].max() == 3 and seen[0].min() == -3
    policy.noise_std = 1e-3
    policy(torch.zeros(1, 200, 3))
    assert 5e-4 < seen[1].std() < 2e-3


# --- world model, Eq. (4) and (6) ---


def test_model_loss():
    """Eq. (6), and Eq. (4) at weights one, on two rows of two outputs."""
    mean = torch.tensor([[[[1.0, 2.0], [0.0, 0.0]]]])
    log_std = torch.tensor([[[[0.0, LN2], [0.0, 0.0]]]])
    target = torch.zeros(1, 1, 2, 2)
    # Row 0: (1 + (4 / 4 + 2 log 2)) / 2 = 1.6931472. Row 1: 0.
    unweighted = ampl.model_loss(mean, log_std, target, torch.ones(1, 1, 2))
    weighted = ampl.model_loss(mean, log_std, target, torch.tensor([[[3.0, 1.0]]]))
    assert unweighted.tolist() == [[pytest.approx(0.8465736)]]
    assert weighted.tolist() == [[pytest.approx(2.5397208)]]


def test_weighted_likelihood_prefers_heavy_rows():
    """Rows at +1 and -1 with weights 1.5 and 0.5: the loss is stationary at mean 0.5."""
    mean = torch.full((1, 1, 2, 1), 0.5, requires_grad=True)
    target = torch.tensor([[[[1.0], [-1.0]]]])
    loss = ampl.model_loss(mean, torch.zeros(1, 1, 2, 1), target, torch.tensor([[[1.5, 0.5]]]))
    (grad,) = torch.autograd.grad(loss.sum(), mean)
    assert grad.abs().max() > 0.1 and grad.sum().abs() < 1e-6


def test_model_step_uses_the_weights_of_its_rows():
    """Rows at +1 (weight 1.5) and -1 (0.5) with the same input: every member settles at 0.5.

    Only training rows are drawn: the last ten, at 9, are held out. Tolerance: 0.15.
    """
    torch.manual_seed(0)
    args = tiny(model_lr=1e-2, model_batch_size=64)
    agent = ampl.AMPL(args, 3, 2, CPU)
    inputs, targets, weight = torch.zeros(50, 5), torch.ones(50, 4), torch.full((1, 50), 1.5)
    targets[20:40], weight[:, 20:40], targets[40:] = -1.0, 0.5, 9.0
    for _ in range(200):
        ampl.model_step(agent, inputs, targets, weight, torch.arange(40)[None], args)
    mean = agent.model(torch.zeros(1, 3, 1, 5))[0]
    torch.testing.assert_close(mean, torch.full_like(mean, 0.5), atol=0.15, rtol=0)


def test_holdout_loss():
    """Chunks of 512 add up to the mean over 600 rows; weights and row numbers are respected."""
    args = tiny()
    agent = ampl.AMPL(args, 3, 2, CPU)
    agent.model.forward = lambda x: (torch.zeros(*x.shape[:-1], 4), torch.zeros(*x.shape[:-1], 4))
    targets, weight = torch.zeros(700, 4), torch.ones(1, 700)
    targets[100:] = 2.0  # rows 0 to 99 are not held out
    weight[:, 400:] = 0.5
    rows = torch.arange(100, 700)[None]
    # 300 rows at 1 * 4 and 300 at 0.5 * 4.
    loss = ampl.holdout_loss(agent, torch.zeros(700, 5), targets, weight, rows)
    assert loss.tolist() == [[pytest.approx(3.0)] * 3]


def test_soft_bounds_of_log_std():
    """Far outside its bounds log_std is the bound; inside it nearly passes."""
    model = ampl.DynamicsEnsemble(1, 2, 3, 2, 8)
    for layer in [*model.trunk, model.heads]:
        nn.init.zeros_(layer.weight)
    # softplus(2.75) = 2.81197, so -2.5 becomes -2.56197; softplus(2.43803) = 2.52176.
    for raw, expected in ((-100.0, -5.0), (100.0, 0.25523), (-2.5, -2.47824)):
        model.heads.bias.data.fill_(raw)
        log_std = model(torch.zeros(1, 2, 1, 5))[1]
        assert log_std.unique().tolist() == [pytest.approx(expected, abs=1e-4)]


def ensemble_of_constants(members: int, log_std: float = -40.0) -> ampl.DynamicsEnsemble:
    """Member m predicts reward m and, whatever the action, delta = normalised obs."""
    model = ampl.DynamicsEnsemble(2, members, 3, 2, 8)

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        member = torch.arange(float(members)).view(1, -1, 1, 1).expand(*x.shape[:-1], 1)
        mean = torch.cat([member, x[..., :3]], -1)
        return mean, torch.full_like(mean, log_std)

    model.forward = forward
    return model


@pytest.mark.parametrize("rows", [20, 23, 3])
def test_ensemble_sample_shares_rows_among_members(rows):
    """Members serve numbers of rows that differ by at most one; every row gets its own delta."""
    torch.manual_seed(0)
    model, first = ensemble_of_constants(5), set()
    obs = torch.arange(2.0 * rows * 3).view(2, rows, 3)
    for _ in range(60):
        reward, next_obs = model.sample(obs, torch.zeros(2, rows, 2))
        counts = torch.bincount(reward[0].round().long(), minlength=5)
        assert counts.max() - counts.min() <= 1
        torch.testing.assert_close(next_obs, 2 * obs)
        first.add(round(reward[1, 0].item()))
    assert first == {0, 1, 2, 3, 4}, "a row must meet every member in turn"


def test_ensemble_sample_units_and_noise():
    """Inputs and outputs are rescaled, the noise has the predicted deviation, NaN becomes 0."""
    torch.manual_seed(0)
    model = ensemble_of_constants(2)
    model.input_mean[:3], model.input_std[:3] = 1.0, 2.0
    model.target_mean.copy_(torch.tensor([10.0, 0.5, 0.5, 0.5]))
    model.target_std.copy_(torch.tensor([4.0, 8.0, 8.0, 8.0]))
    reward, next_obs = model.sample(torch.full((2, 4, 3), 5.0), torch.zeros(2, 4, 2))
    assert set(reward.flatten().tolist()) == {10.0, 14.0}  # 4 m + 10
    assert next_obs.unique().tolist() == [pytest.approx(5 + 8 * 2 + 0.5)]  # (5 - 1) / 2 = 2
    noisy = ensemble_of_constants(2, log_std=-LN2)
    noisy.target_std.fill_(3.0)
    _, next_obs = noisy.sample(torch.zeros(2, 4000, 3), torch.zeros(2, 4000, 2))
    assert next_obs.std().item() == pytest.approx(1.5, rel=0.05)
    reward, next_obs = model.sample(torch.full((2, 4, 3), math.nan), torch.zeros(2, 4, 2))
    assert reward.isfinite().all()


def test_ensemble_recovers_a_linear_gaussian_system():
    """A short fit finds mean and noise: delta = 2a + noise of deviation 0.2 exp(a).

    Tolerances: 0.1 on the mean (its range is 4), 25 % on the two deviations, for all members.
    """
    torch.manual_seed(0)
    args = tiny(model_hidden=16, model_batch_size=128, model_epoch_steps=500, model_max_epochs=3,
                model_lr=2e-3, ensemble_size=2)  # fmt: skip
    rows = 4000
    obs, action = torch.randn(rows, 1), torch.rand(rows, 1) * 2 - 1
    noise = torch.randn(rows, 1) * 0.2 * action.exp()
    columns = [obs, action, action.square(), obs + 2 * action + noise, torch.zeros(rows, 1)]
    data = torch.cat(columns, -1)
    agent = ampl.AMPL(args, 1, 1, CPU)
    ampl.fit_model(agent, dataset_of(data, 1, 1), data, torch.ones(1, rows), args, 0, StubRun())
    model = agent.elites
    test_action = torch.tensor([-0.8, -0.5, 0.5, 0.8])
    x = torch.stack([torch.zeros(4), test_action], -1)
    x = ((x - model.input_mean) / model.input_std).expand(1, 2, 4, 2)
    with torch.no_grad():
        mean, log_std = model(x)
    mean = (mean * model.target_std + model.target_mean)[0, :, :, 1]
    std = (log_std.exp() * model.target_std)[0, :, :, 1]
    torch.testing.assert_close(mean, (2 * test_action).expand(2, 4), atol=0.1, rtol=0)
    truth = torch.tensor([0.0899, 0.1213, 0.3297, 0.4451]).expand(2, 4)
    torch.testing.assert_close(std, truth, atol=0, rtol=0.25)


def test_training_pairs():
    """Targets are (reward, s' - s) in unit deviation; rows without a stored s' stay out."""
    agent = ampl.AMPL(tiny(), 3, 2, CPU)
    data = random_data(50)
    dataset = dataset_of(data, 3, 2)
    dataset.has_next[7] = False
    inputs, targets, rows = ampl.training_pairs(agent, dataset, data)
    assert len(rows) == 49 and 7 not in rows
    for x in (inputs, targets):
        torch.testing.assert_close(x.mean(0), torch.zeros(x.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.std(0), torch.ones(x.shape[1]))
    delta = targets[0, 1:] * agent.model.target_std[1:] + agent.model.target_mean[1:]
    torch.testing.assert_close(delta, data[0, 6:9] - data[0, :3])


# --- early stopping ---


def judge(agent: ampl.AMPL, fit: dict, args: ampl.Args, loss: list, mark: float) -> None:
    """One epoch: all members' weights become `mark`, then their losses are judged."""
    for p in agent.model.member_parameters():
        p.data.fill_(mark)
    ampl.judge_epoch(agent, fit, torch.tensor(loss), args)


def test_early_stopping_and_elites():
    """Gains count above 1 % of |best|, negative losses too; members return to their best epoch."""
    args = tiny(model_patience=3)
    agent = ampl.AMPL(args, 3, 2, CPU)
    fit = ampl.fit_state(agent)
    judge(agent, fit, args, [[1.0, -1.0, 0.5]], 1.0)
    assert fit["best"].tolist() == [[1.0, -1.0, 0.5]] and fit["idle"].tolist() == [0]
    judge(agent, fit, args, [[0.995, -1.02, 0.6]], 2.0)  # 0.5 %, 2 %, worse
    assert fit["best"].tolist() == [[1.0, pytest.approx(-1.02), 0.5]] and fit["idle"].item() == 0
    judge(agent, fit, args, [[0.991, -1.0, math.nan]], 3.0)  # nobody
    judge(agent, fit, args, [[0.992, -1.03, 0.5]], 4.0)  # 0.8 %, 0.98 %, equal
    assert fit["idle"].item() == 2 and not fit["stopped"].any()
    judge(agent, fit, args, [[2.0, 2.0, 2.0]], 5.0)
    assert fit["idle"].item() == 3 and fit["stopped"].all() and fit["epoch"] == 5
    ampl.restore_best(agent, fit)
    ampl.choose_elites(agent, fit["best"], args)
    for p in agent.model.member_parameters():
        assert p.flatten(2).unique(dim=-1).flatten().tolist() == [1.0, 2.0, 1.0]
    # The two elites are member 1 (-1.02, epoch 2) and member 2 (0.5, epoch 1).
    for p in agent.elites.member_parameters():
        assert p.flatten(2).unique(dim=-1).flatten().tolist() == [2.0, 1.0]


def test_a_stopped_learner_is_restored():
    """Learner 0 stops first; what happens to it afterwards leaves no trace."""
    args = tiny(model_patience=1, num_seeds=2)
    agent = ampl.AMPL(args, 3, 2, CPU)
    fit = ampl.fit_state(agent)
    judge(agent, fit, args, [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], 1.0)
    agent.model.max_log_std.data.fill_(7.0)
    judge(agent, fit, args, [[1.0, 2.0, 3.0], [0.5, 1.0, 1.5]], 2.0)
    assert fit["stopped"].tolist() == [True, False]
    moments = agent.optimizers["model"].state[agent.model.heads.weight]["exp_avg"]
    moments.fill_(9.0)
    agent.model.max_log_std.data.fill_(8.0)
    judge(agent, fit, args, [[0.1, 0.1, 0.01], [0.5, 1.0, 1.5]], 3.0)  # learner 0 "gains"
    assert fit["stopped"].all()
    ampl.restore_best(agent, fit)
    assert fit["best"].tolist() == [[1.0, 2.0, 3.0], [0.5, 1.0, 1.5]]
    for p in agent.model.member_parameters():
        assert (p[0] == 1.0).all() and (p[1] == 2.0).all()
    assert (agent.model.max_log_std[0] == 7.0).all() and (agent.model.max_log_std[1] == 8.0).all()
    assert (moments[0] == 0.0).all() and (moments[1] == 9.0).all()


def test_model_fit_of_a_learner_ignores_the_other():
    """Weights, moments and elites of learner 0 are bit for bit the same whatever learner 1 is."""
    args = tiny(num_seeds=2, model_max_epochs=60, model_patience=1, model_lr=3e-2)
    data = random_data(60)
    results, epochs = [], []
    for changed in (False, True):
        agent = ampl.AMPL(args, 3, 2, CPU)
        weight = torch.ones(2, 60)
        if changed:
            for p in agent.model.parameters():
                p.data[1] *= 2.0
        run = StubRun()
        ampl.fit_model(agent, dataset_of(data, 3, 2), data, weight, args, 0, run)
        state = [t[0].clone() for t in ampl.model_tensors(agent)]
        results.append(state + parameters_of(agent.elites, 0))
        epochs.append(run.progress["fit"]["epoch"])
    assert same(*results)
    assert epochs[0] != epochs[1], "the test must cover a learner that waits for the other"


# --- importance weights, Eq. (10) and (11) ---


def test_miw_moments():
    """Eq. (10): 5.5 on the left, 0.9 * 5 + 0.1 * 3 = 4.8 on the right."""
    left, right = ampl.miw_moments(
        omega=torch.tensor([[2.0, 1.0]]),
        omega_slow=torch.tensor([[1.0, 4.0]]),
        q=torch.tensor([[3.0, 5.0]]),
        q_next=torch.tensor([[2.0, 2.0]]),
        q_initial=torch.tensor([[2.0, 4.0, 3.0]]),
        gamma=0.9,
    )
    assert left.tolist() == pytest.approx([5.5]) and right.tolist() == pytest.approx([4.8])


def test_miw_loss():
    """Eq. (11): half the square within 1, linear beyond."""
    left, right = torch.tensor([5.5, 1.0]), torch.tensor([4.8, 4.0])
    assert ampl.miw_loss(left, right).tolist() == pytest.approx([0.245, 2.5])


@pytest.mark.parametrize("use_tables", [False, True])
def test_miw_step_stops_at_terminals(use_tables):
    """Q = 1 and omega = 0.929: the sides are 0.929 and 0.01, plus 0.99 * 0.929 where it goes on."""
    args = tiny()
    for terminal, expected in ((1.0, 0.4223), (0.0, 0.0)):  # (0.929 - 0.01) ** 2 / 2
        agent, data, tables = ampl.AMPL(args, 3, 2, CPU), random_data(40), None
        data[:, -1] = terminal
        agent.critic.first = lambda obs, action: torch.ones(obs.shape[:2])
        agent.critic_slow.first = agent.critic.first
        if use_tables:
            tables = ampl.QTables(*(torch.zeros(1, 40) for _ in range(3)))
            ampl.fill_tables(agent, tables, data, data[:, :3])
        logs = ampl.miw_step(agent, data, data[:, :3], tables, args)
        assert logs["losses/weight_loss"].item() == pytest.approx(expected, abs=0.005)


def test_importance_weight_start_values():
    """softplus(0) ** alpha: 0.929 for alpha 0.2 and 0.833 for alpha 0.5."""
    for alpha, start in ((0.2, 0.929), (0.5, 0.833)):
        net = ampl.ImportanceWeight(1, 3, 2, tiny(miw_alpha=alpha))
        omega = net(torch.randn(1, 50, 3), torch.randn(1, 50, 2))
        torch.testing.assert_close(omega, torch.full_like(omega, start), atol=0.005, rtol=0)


def test_project_gradient():
    """Inactive below the bound, bent above it; never moves mean omega up faster than allowed."""
    g = [torch.tensor([[1.0, 2.0], [1.0, 2.0], [-3.0, 0.0]])]
    c = [torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])]
    mean = torch.tensor([4.0, 13.0, 9.0])
    (bent,) = ampl.project_gradient(g, c, mean, 10.0)
    # Learner 0: phi = -6 < <g, c> = 1. Learner 1: phi = min(3, 1) = 1 = <g, c>: both untouched.
    assert torch.equal(bent[:2], g[0][:2])
    # Learner 2: phi = -1, <g, c> = -6, so l = 5 / 4 and g' = (-3 + 2.5, 0).
    assert bent[2].tolist() == pytest.approx([-0.5, 0.0])
    # Far above the bound phi = |c|^2 = 4: l = (4 + 6) / 4 and g' = (2, 0).
    (bent,) = ampl.project_gradient([g[0][2:]], [c[0][2:]], torch.tensor([99.0]), 10.0)
    assert bent[0].tolist() == pytest.approx([2.0, 0.0])


def test_project_gradient_respects_the_bound():
    """<g', c> >= min(mean omega - bound, |c|^2) for random gradients of any shape."""
    torch.manual_seed(0)
    grads = [torch.randn(100, 3, 2), torch.randn(100, 1, 4)]
    means = [torch.randn(100, 3, 2), torch.randn(100, 1, 4)]
    mean_omega = 10 + 5 * torch.randn(100)
    bent = ampl.project_gradient(grads, means, mean_omega, 10.0)
    active = 0
    for before, after, c in zip(grads, bent, means, strict=True):
        dot, norm2 = (after * c).sum((1, 2)), c.square().sum((1, 2))
        assert (dot >= torch.minimum(mean_omega - 10, norm2) - 1e-4).all()
        active += (before != after).flatten(1).any(1).sum().item()
    assert 20 < active < 180


def test_mean_omega_stays_below_its_bound():
    """From 0.93 the trainer comes down to a bound of 0.5 although the loss asks for more."""
    args = tiny(miw_mean_bound=0.5, miw_lr=3e-3)
    agent = ampl.AMPL(args, 3, 2, CPU)
    agent.critic.first = lambda obs, action: torch.ones(obs.shape[:2])
    agent.critic_slow.first = agent.critic.first  # so that Eq. (10) asks for mean omega 1
    data = random_data(100)
    torch.manual_seed(0)
    for _ in range(400):
        ampl.miw_step(agent, data, data[:, :3], None, args)
    assert agent.omega(data[None, :, :3], data[None, :, 3:5]).mean() < 0.55


def test_normalised_weight_has_mean_one():
    """omega over the data divided by its mean, per learner."""
    args = tiny(num_seeds=2)
    agent = ampl.AMPL(args, 3, 2, CPU)
    nn.init.normal_(agent.omega.net.out.weight)
    data = random_data(5000)  # more than one chunk
    weight = ampl.normalised_weight(agent, data)
    assert weight.std() > 0.01
    torch.testing.assert_close(weight.mean(-1), torch.ones(2))
    omega = agent.omega(data[None, :, :3].expand(2, -1, -1), data[None, :, 3:5].expand(2, -1, -1))
    torch.testing.assert_close(weight[:, 4999] / weight[:, 0], omega[:, 4999] / omega[:, 0])


# --- gradients and targets ---


def test_clip_gradients_per_learner():
    """Norm 5 is cut to 1 over all tensors of a learner; the other learner's 0.5 is left alone."""
    grads = [torch.tensor([[[3.0]], [[0.3]]]), torch.tensor([[[0.0, 4.0]], [[0.4, 0.0]]])]
    first, second = ampl.clip_gradients(grads, 1.0)
    assert first.flatten().tolist() == pytest.approx([0.6, 0.3])
    assert second.flatten().tolist() == pytest.approx([0.0, 0.8, 0.4, 0.0])


def test_polyak():
    """slow + 0.25 (fast - slow)."""
    slow, fast = nn.Linear(2, 1), nn.Linear(2, 1)
    slow.weight.data.fill_(1.0)
    fast.weight.data.fill_(5.0)
    ampl.polyak(slow, fast, 0.25)
    assert slow.weight.tolist() == [[2.0, 2.0]] and fast.weight.tolist() == [[5.0, 5.0]]


# --- schedule, rewards, termination ---


def test_real_rows_schedule():
    """512 rows until epoch 45, then 460, 409, 358, 307 for five epochs each, 256 from epoch 66."""
    args = ampl.Args()
    expected = {1: 512, 40: 512, 41: 512, 45: 512, 46: 460, 50: 460, 51: 409, 55: 409, 56: 358,
                60: 358, 61: 307, 65: 307, 66: 256, 1000: 256}  # fmt: skip
    for epoch, rows in expected.items():
        assert ampl.scheduled_real_rows((epoch - 1) * 1000, args) == rows, epoch
        assert ampl.scheduled_real_rows(epoch * 1000 - 1, args) == rows, epoch


def test_scale_rewards():
    """(r - min + 0.001) / span; equal rewards are refused."""
    scaled = ampl.scale_rewards(torch.tensor([1.0, 3.0, 5.0]))
    assert scaled.tolist() == pytest.approx([0.00025, 0.50025, 1.00025])
    with pytest.raises(ampl.UserError):
        ampl.scale_rewards(torch.ones(3))


def test_rows_and_ranges():
    """Twice the largest |s| per entry; rewards: ten deviations beyond the scaled extremes."""
    data = torch.tensor(
        [
            [1.0, -2.0, 0.0, 0.0, 3.0, 1.0, 0.0],
            [0.5, 1.0, 0.0, 1.0, 0.0, -4.0, 1.0],
        ]
    )
    dataset = dataset_of(data, 2, 1)
    dataset.reward = ampl.scale_rewards(dataset.reward)
    rows = ampl.data_rows(dataset, CPU)
    rule = ampl.termination_rule(dataset, tiny(env_id="maze2d-umaze-v1"), CPU)
    assert rule.obs_limit.tolist() == [6.0, 8.0]
    # Rewards 0.001 and 1.001, deviation 0.7071068: max(|0.001 - 7.071068|, 1.001 + 7.071068).
    assert rule.reward_limit.item() == pytest.approx(8.072068)
    assert rows[:, 3].tolist() == pytest.approx([0.001, 1.001])
    assert torch.equal(rows[:, 4:], data[:, 4:])


def test_termination_rule():
    """Ends at the known rule or beyond a range; only the ranges overwrite the reward."""
    known = lambda s: s[..., 1] > 1.5  # noqa: E731
    rule = ampl.TerminationRule(known, torch.tensor([6.0, 8.0]), torch.tensor(5.0))
    rows = [  # next_obs, reward -> reward, terminated
        ([6.0, -8.0], 5.0, 5.0, 0.0),  # on all limits: still inside
        ([6.01, 0.0], 1.0, -5.0, 1.0),
        ([-6.01, 0.0], 1.0, -5.0, 1.0),
        ([0.0, -8.01], 1.0, -5.0, 1.0),
        ([0.0, 0.0], 5.01, -5.0, 1.0),
        ([0.0, 0.0], -5.01, -5.0, 1.0),
        ([0.0, 2.0], 1.0, 1.0, 1.0),  # known rule: the reward stays
        ([0.0, 9.0], 1.0, -5.0, 1.0),  # both
    ]
    next_obs, reward = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    new_reward, terminated = rule(reward[None], next_obs[None])
    assert new_reward[0].tolist() == pytest.approx([r[2] for r in rows])
    assert terminated[0].tolist() == [r[3] for r in rows]


HOPPER = [  # next_obs (cut to its first entries), terminated
    ([1.2, 0.0, 0.0], False),
    ([0.69, 0.0, 0.0], True),
    ([0.71, 0.19, 99.0], False),
    ([1.2, 0.21, 0.0], True),
    ([1.2, -0.21, 0.0], True),
    ([1.2, 0.0, 100.5], True),
    ([1.2, 0.0, -100.5], True),
    ([150.0, 0.0, 0.0], False),  # the height itself has no upper limit
    ([1.2, 0.0, math.nan], True),
    ([math.inf, 0.0, 0.0], True),
]
WALKER = [
    ([1.2, 0.0, 500.0], False),
    ([0.79, 0.0, 0.0], True),
    ([0.81, 0.99, 0.0], False),
    ([1.99, -0.99, 0.0], False),
    ([2.01, 0.0, 0.0], True),
    ([1.2, 1.01, 0.0], True),
    ([1.2, -1.01, 0.0], True),
    ([math.nan, 0.0, 0.0], True),
]


ANT = [
    ([0.19, 0.0, 0.0], True),
    ([0.21, 9.0, -500.0], False),
    ([0.99, 0.0, 0.0], False),
    ([1.01, 0.0, 0.0], True),
    ([0.5, math.nan, 0.0], True),
]


@pytest.mark.parametrize(
    "env_id, rows, width",
    [
        ("hopper-medium-v2", HOPPER, 11),
        ("walker2d-medium-replay-v2", WALKER, 17),
        ("ant-angle-v0", ANT, 27),
    ],
)
def test_known_termination_of_walkers(env_id, rows, width):
    """Hand-made states on both sides of every limit."""
    rule, known = ampl.known_termination(env_id)
    states = torch.zeros(1, len(rows), width)
    states[0, :, :3] = torch.tensor([r[0] for r in rows])
    assert known and rule(states)[0].tolist() == [r[1] for r in rows]


def test_known_termination_of_pen_and_others():
    """Pen: entry 26 below 0.075. Half-cheetah, mazes and door never end; others are unknown."""
    rule, known = ampl.known_termination("pen-human-v1")
    states = torch.full((1, 3, 45), -9.0)
    states[0, :, 26] = torch.tensor([0.0749, 0.0751, 0.3])
    assert known and rule(states)[0].tolist() == [True, False, False]
    for env_id in ("halfcheetah-medium-v2", "maze2d-large-v1", "door-expert-v1"):
        rule, known = ampl.known_termination(env_id)
        assert known and not rule(torch.full((1, 2, 39), -1e6)).any()
    rule, known = ampl.known_termination("Swimmer-v5")
    assert not known and not rule(torch.zeros(1, 2, 27)).any()


# --- buffer, mix and rollouts ---


def numbered(agent: ampl.AMPL, numbers: range) -> ampl.Batch:
    """Transitions whose rewards are the given numbers (plus 1000 for learner 1)."""
    shape = (agent.learners, len(numbers))
    reward = torch.tensor(list(numbers), dtype=torch.float) + 1000.0 * torch.arange(
        float(agent.learners)
    ).unsqueeze(-1)
    obs, action = torch.zeros(*shape, 3), torch.zeros(*shape, 2)
    return ampl.Batch(obs, action, reward, obs + 5, torch.ones(shape))


def test_buffer_is_first_in_first_out():
    """Ten rows of room: after 8 and 5 rows the oldest three are gone."""
    agent = ampl.AMPL(tiny(buffer_size=10), 3, 2, CPU)
    agent.remember(numbered(agent, range(8)))
    assert agent.buffer_rows == 8 and agent.buffer_end == 8
    agent.remember(numbered(agent, range(8, 13)))
    stored = agent.split(agent.buffer)
    assert stored.reward[0].tolist() == [10, 11, 12, 3, 4, 5, 6, 7, 8, 9]
    assert agent.buffer_rows == 10 and agent.buffer_end == 3
    assert (stored.next_obs == 5).all() and (stored.terminated == 1).all()


def test_mixed_batch():
    """The first real_rows rows come from data, the rest from the filled part of the own buffer."""
    agent = ampl.AMPL(tiny(num_seeds=2), 3, 2, CPU)
    agent.remember(numbered(agent, range(1, 5)))  # 60 of 64 rows stay empty (reward 0)
    data = random_data(30)
    data[:, 5] = -1.0 - torch.arange(30)
    torch.manual_seed(0)
    for real in (0, 5, 512):
        agent.real_rows.fill_(real)
        reward = agent.sample(data, 512).reward
        assert (reward[:, :real] < 0).all() and (reward[:, real:] > 0).all()
        if real == 5:
            assert reward[0, 5:].unique().tolist() == [1, 2, 3, 4]
            assert reward[1, 5:].unique().tolist() == [1001, 1002, 1003, 1004]
        if real == 512:
            assert len(reward.unique()) == 30


def counting_agent(args: ampl.Args) -> tuple[ampl.AMPL, torch.Tensor, ampl.TerminationRule]:
    """Stored states are 100, 200, ...; the model adds 1 per step; x02 is terminal."""
    agent = ampl.AMPL(args, 1, 2, CPU)
    agent.elites.sample = lambda obs, action: (obs[..., 0] / 1000, obs + 1)
    data = torch.zeros(50, 6)
    data[:, 0] = 100.0 * torch.arange(1, 51)
    known = lambda s: s[..., 0] % 100 == 2  # noqa: E731
    return agent, data, rule_for(1, known)


def test_imagine_transitions():
    """Slots x horizon rows; an ended slot keeps its last step and restarts at a stored state."""
    args = tiny(horizon=5, rollout_rows=33, buffer_size=100)  # 7 slots, 35 rows
    agent, data, rule = counting_agent(args)
    logs = ampl.imagine(agent, data, rule, args)
    assert agent.buffer_rows == 35
    assert logs["rollout/terminated_frac"].tolist() == pytest.approx([2 / 5])
    rows = agent.split(agent.buffer[:, :35].view(1, 5, 7, 6))  # [1, step, slot]
    obs, next_obs = rows.obs[0, ..., 0], rows.next_obs[0, ..., 0]
    assert torch.equal(next_obs, obs + 1) and torch.equal(rows.reward[0], obs / 1000)
    assert torch.equal(rows.terminated[0], (next_obs % 100 == 2).float())
    assert (obs % 100).tolist() == [[0.0] * 7, [1.0] * 7, [0.0] * 7, [1.0] * 7, [0.0] * 7]
    assert torch.equal(obs[1], obs[0] + 1) and torch.equal(obs[3], obs[2] + 1)
    assert set(obs[2].tolist()) <= set(data[:, 0].tolist())
    assert not torch.equal(obs[2], obs[0]), "restarts must be drawn anew"


def test_imagine_overwrites_the_oldest():
    """With room for 40 rows the second refresh of 35 leaves the first one's last five."""
    args = tiny(horizon=5, rollout_rows=33, buffer_size=40)
    agent, data, rule = counting_agent(args)
    ampl.imagine(agent, data, rule, args)
    before = agent.buffer.clone()
    ampl.imagine(agent, data, rule, args)
    kept = (agent.buffer == before).all(-1)[0]
    assert agent.buffer_rows == 40 and agent.buffer_end == 30
    assert kept[30:35].all() and not kept[:30].any() and not kept[35:].any()


def test_imagine_actions():
    """One action per row; one per chunk and step under --shared-rollout-action."""
    args = tiny(horizon=3, rollout_rows=24)
    agent, data, rule = counting_agent(args)
    data[:, 0] /= 1000  # so that tanh does not saturate
    ampl.imagine(agent, data, rule, args)
    action = agent.split(agent.buffer[:, :24]).action[0]
    assert len(action.unique(dim=0)) == 24 and action.abs().max() <= 1
    shared = tiny(horizon=3, rollout_rows=3 * 3000, buffer_size=9000, shared_rollout_action=True)
    agent, data, rule = counting_agent(shared)
    data[:, 0] /= 1000
    ampl.imagine(agent, data, rule, shared)
    action = agent.split(agent.buffer).action[0]
    assert len(action.unique(dim=0)) == 6  # two chunks (2048 and 952 rows) of three steps
    for chunk, start in ((2048, 0), (952, 3 * 2048)):
        steps = action[start : start + 3 * chunk].view(3, chunk, 2)
        assert torch.equal(steps, steps[:, :1].expand_as(steps))


# --- whole iterations ---


def warmed_agent(args: ampl.Args, data: torch.Tensor) -> tuple[ampl.AMPL, ampl.TerminationRule]:
    """An agent with a filled buffer and half of every batch from it."""
    agent, rule = ampl.AMPL(args, 3, 2, CPU), rule_for(3)
    torch.manual_seed(1)
    ampl.imagine(agent, data, rule, args)
    agent.real_rows.fill_(args.batch_size // 2)
    return agent, rule


def test_step_actor_gates_the_policy():
    """Without step_actor the policy stands still (its target does not); with it, it moves."""
    args, data = tiny(), random_data(40)
    agent, rule = warmed_agent(args, data)
    agent.actor_target.net.out.bias.data += 1.0
    modules = ("actor", "critic", "discriminator", "actor_target", "critic_target")
    for warmup, step_actor in ((True, False), (False, False), (True, True), (False, True)):
        before = {name: parameters_of(getattr(agent, name)) for name in modules}
        model = parameters_of(agent.model) + parameters_of(agent.elites)
        ampl.iterate(agent, data, rule, args, warmup, step_actor)
        moved = {n: not same(before[n], parameters_of(getattr(agent, n))) for n in modules}
        assert moved.pop("actor") == step_actor
        assert all(moved.values()), moved
        assert same(model, parameters_of(agent.model) + parameters_of(agent.elites))


def test_critic_update_touches_only_the_critic():
    """update_critic moves all of the critic and nothing else."""
    args, data = tiny(), random_data(40)
    agent, _ = warmed_agent(args, data)
    names = ("actor", "actor_target", "critic_target", "discriminator", "omega", "elites")
    before = {name: parameters_of(getattr(agent, name)) for name in names}
    critic = parameters_of(agent.critic)
    ampl.update_critic(agent, agent.sample(data, 16), args)
    assert all(same(before[name], parameters_of(getattr(agent, name))) for name in names)
    assert not any(map(torch.equal, critic, parameters_of(agent.critic)))


def test_critic_gradient_is_clipped():
    """Both critics of a learner together step along a gradient of norm 0.1."""
    args, data = tiny(num_seeds=2), random_data(40)
    data[:, 5] += 100.0
    agent, _ = warmed_agent(args, data)
    ampl.update_critic(agent, agent.sample(data, 16), args)
    norm2 = sum(p.grad.square().flatten(1).sum(1) for p in agent.critic.parameters())
    assert norm2.sqrt().tolist() == pytest.approx([0.1, 0.1], rel=1e-3)


def test_critic_bootstraps_from_the_targets():
    """The target is Q' of the target critic at s' and the target policy's action there."""
    args, data = tiny(critic_grad_norm=1e9), random_data(40)
    agent, _ = warmed_agent(args, data)
    batch, seen = agent.sample(data, 16), []
    agent.actor_target.forward = lambda obs: obs[..., :2] / 2

    def q_next(obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        seen.extend((obs, action))
        return torch.full((1, 2, 16), 50.0)

    agent.critic_target.forward = q_next
    for p in agent.critic.parameters():
        nn.init.zeros_(p)
    logs = ampl.update_critic(agent, batch, args)
    assert torch.equal(seen[0], batch.next_obs)
    torch.testing.assert_close(seen[1], torch.tanh(batch.next_obs[..., :2] / 2))
    # Q = 0, so every row adds half the square of r + 0.99 * 50, for two critics.
    expected = (batch.reward + 49.5).square().mean().item()
    assert logs["losses/critic_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_critic_learns_the_target():
    """At terminals the regression target is the reward: Q goes to it."""
    args = tiny(critic_lr=1e-2, batch_size=64)
    data = random_data(64)
    data[:, 5], data[:, -1] = 0.7, 1.0
    agent = ampl.AMPL(args, 3, 2, CPU)
    agent.real_rows.fill_(64)
    for _ in range(150):
        ampl.update_critic(agent, agent.sample(data, 64), args)
    q = agent.critic(data[None, :, :3], data[None, :, 3:5])
    assert (q - 0.7).abs().mean() < 0.1


def test_warm_start_ignores_the_critic():
    """The policy's step depends on Q after the warm start and not during it."""
    args, data = tiny(), random_data(40)
    for warmup in (True, False):
        results = []
        for shift in (0.0, 1.0):
            agent, rule = warmed_agent(args, data)
            agent.critic.net.out.weight.data += shift
            torch.manual_seed(2)
            batch = agent.sample(data, args.batch_size)
            logs = ampl.update_gan(agent, batch, data, rule, args, warmup, True)
            results.append(parameters_of(agent.actor))
            assert torch.equal(logs["losses/actor_loss"], logs["losses/generator_loss"]) == warmup
        assert same(*results) == warmup


def test_policy_climbs_q():
    """With a large lambda' the policy's actions go where the critic is highest: to a = +1."""
    args, data = tiny(q_coef=1e4, actor_lr=1e-2), random_data(40)
    agent, rule = warmed_agent(args, data)
    agent.critic.forward = lambda obs, action: action.sum(-1).unsqueeze(1).expand(-1, 2, -1) + 9
    batch = agent.sample(data, args.batch_size)
    for _ in range(40):
        ampl.update_gan(agent, batch, data, rule, args, False, True)
    assert torch.tanh(agent.actor(batch.obs)).mean() > 0.8


def test_q_avg():
    """First the batch's mean |min Q| (3), then 0.5 % of the way to the next one (5): 3.01."""
    args, data = tiny(), random_data(40)
    agent, rule = warmed_agent(args, data)
    batch = agent.sample(data, args.batch_size)
    assert agent.q_avg.item() < 0  # no batch seen yet
    nn.init.zeros_(agent.critic.net.out.weight)
    for bias, expected in ((-3.0, 3.0), (-5.0, 3.01)):
        agent.critic.net.out.bias.data[:, 0] = bias  # the smaller critic
        agent.critic.net.out.bias.data[:, 1] = 1.0
        ampl.update_gan(agent, batch, data, rule, args, False, False)
        assert agent.q_avg.item() == pytest.approx(expected)


def test_learners_do_not_touch_each_other():
    """Learner 0 after several iterations is bit for bit the same whatever learner 1 holds."""
    args, data = tiny(num_seeds=2), random_data(40)
    results = []
    for changed in (False, True):
        agent, rule = warmed_agent(args, data)
        if changed:
            agent.buffer[1] += 0.5
            for name in ("actor", "critic", "discriminator", "elites", "critic_target"):
                for p in getattr(agent, name).parameters():
                    p.data[1] *= 3.0
        torch.manual_seed(3)
        for i in range(4):
            ampl.iterate(agent, data, rule, args, i < 2, i % 2 == 0)
        ampl.imagine(agent, data, rule, args)
        modules = (agent.actor, agent.critic, agent.discriminator, agent.actor_target)
        state = [p for m in (*modules, agent.critic_target) for p in parameters_of(m, 0)]
        results.append([*state, agent.q_avg[0].clone(), agent.buffer[0].clone()])
        results[-1].append(agent.critic.net.out.weight[1].detach().clone())
    assert same(results[0][:-1], results[1][:-1])
    assert not torch.equal(results[0][-1], results[1][-1])


def test_miw_of_a_learner_ignores_the_other():
    """The same for miw_step, whose gradients are projected and clipped per learner."""
    args, data = tiny(num_seeds=2, miw_lr=1e-2, miw_mean_bound=0.9), random_data(40)
    results = []
    for factor in (1.0, 5.0):
        agent = ampl.AMPL(args, 3, 2, CPU)
        start = copy.deepcopy(agent.omega)
        for p in [*agent.critic.parameters(), *agent.omega.parameters()]:
            p.data[1] *= factor
        torch.manual_seed(3)
        for _ in range(4):
            ampl.miw_step(agent, data, data[:, :3], None, args)
        results.append(parameters_of(agent.omega, 0) + parameters_of(agent.omega_slow, 0))
        assert not same(parameters_of(start, 0), parameters_of(agent.omega, 0))
    assert same(*results)
