"""Theorem 1, Proposition 2 and Eq. (10) on small random MDPs, and the omega trainer against them.

Conventions: d is the behaviour policy's discounted occupancy in the true dynamics, J is normalised
(J = expectation of r under the occupancy), rewards lie in [0, r_max].
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import ampl

CPU = torch.device("cpu")


class Mdp(NamedTuple):
    """S states, A actions; rows of P sum to at most one, the rest is the chance to terminate."""

    P: np.ndarray  # [S, A, S]
    r: np.ndarray  # [S, A] in [0, 1]
    mu0: np.ndarray  # [S]
    gamma: float


def simplex(rng: np.random.Generator, *shape: int, sharpness: float = 1.0) -> np.ndarray:
    """Random distributions over the last axis; small sharpness makes them peaked."""
    x = rng.gamma(sharpness, size=shape) + 1e-6
    return x / x.sum(-1, keepdims=True)


def random_mdp(rng: np.random.Generator, gamma: float, S: int = 4, A: int = 2) -> Mdp:
    return Mdp(simplex(rng, S, A, S), rng.uniform(size=(S, A)), simplex(rng, S), gamma)


def transitions(P: np.ndarray, pi: np.ndarray) -> np.ndarray:
    """From (s, a) to (s', a') under pi, [S A, S A]."""
    S, A = pi.shape
    return np.einsum("sat,tb->satb", P, pi).reshape(S * A, S * A)


def occupancy(m: Mdp, pi: np.ndarray, P: np.ndarray | None = None) -> np.ndarray:
    """(1 - gamma) sum_t gamma^t Pr(s_t, a_t), [S, A]."""
    start = (m.mu0[:, None] * pi).ravel()
    matrix = np.eye(start.size) - m.gamma * transitions(m.P if P is None else P, pi).T
    return (1 - m.gamma) * np.linalg.solve(matrix, start).reshape(pi.shape)


def q_values(m: Mdp, pi: np.ndarray) -> np.ndarray:
    """Q of pi in the true dynamics, unnormalised (r + gamma r' + ...), [S, A]."""
    matrix = np.eye(pi.size) - m.gamma * transitions(m.P, pi)
    return np.linalg.solve(matrix, m.r.ravel()).reshape(pi.shape)


def bound_ratio(m: Mdp, mu: np.ndarray, pi: np.ndarray, model: np.ndarray, r_max: float) -> float:
    """|J(pi, P*) - J(pi, model)| over the right side of Theorem 1."""
    gap = abs(((occupancy(m, pi) - occupancy(m, pi, model)) * m.r).sum())
    d, S = occupancy(m, mu), len(m.mu0)
    omega = occupancy(m, pi) / d
    true = np.einsum("sat,tb->satb", m.P, mu).reshape(S, -1, S * mu.shape[1])
    wrong = np.einsum("sat,tb->satb", model, pi).reshape(true.shape)
    log_ratio = np.log(np.where(true > 0, true, 1.0) / np.where(true > 0, wrong, 1.0))
    D = (d * omega * (true * log_ratio).sum(-1)).sum()
    return gap / (m.gamma * r_max / (math.sqrt(2) * (1 - m.gamma)) * math.sqrt(D))


# --- Theorem 1 ---


def test_theorem_1_holds():
    """The bound holds for 200 random (dynamics, behaviour, policy, model), near and far apart."""
    rng = np.random.default_rng(0)
    ratios = []
    for trial in range(200):
        m = random_mdp(rng, gamma=rng.uniform(0.1, 0.95))
        m = m._replace(r=(m.r > 0.5) * 1.0 if trial % 2 else m.r)
        mu, far = simplex(rng, 4, 2), rng.choice([0.0, 0.1, 1.0])
        pi = (1 - far) * mu + far * simplex(rng, 4, 2)
        near = rng.choice([0.1, 1.0])
        model = (1 - near) * m.P + near * simplex(rng, 4, 2, 4)
        ratios.append(bound_ratio(m, mu, pi, model, r_max=1.0))
    assert max(ratios) <= 1
    assert max(ratios) > 0.1, "the random cases should come within ten of the bound"


def one_step_chain(gamma: float, low: float) -> tuple[Mdp, np.ndarray, np.ndarray]:
    """State 0 leads to reward 1 with chance 0.51, else to reward `low`; in the model with 0.5."""
    P, model = np.zeros((3, 1, 3)), np.zeros((3, 1, 3))
    P[0, 0], model[0, 0] = [0, 0.51, 0.49], [0, 0.5, 0.5]
    for absorbing in (1, 2):
        P[absorbing, 0, absorbing] = model[absorbing, 0, absorbing] = 1
    r = np.array([[0.0], [1.0], [low]])
    return Mdp(P, r, np.array([1.0, 0.0, 0.0]), gamma), np.ones((3, 1)), model


def test_theorem_1_is_tight_and_needs_its_assumptions():
    """On a chain |gap| / bound = sqrt(1 - gamma); rewards of both signs double it and break it."""
    for gamma in (0.1, 0.5, 0.9):
        m, only, model = one_step_chain(gamma, low=0.0)
        # Gap: gamma * 0.01. D = (1 - gamma) KL, KL = 2 * 0.01^2 up to higher order.
        ratio = bound_ratio(m, only, only, model, r_max=1.0)
        assert ratio == pytest.approx(math.sqrt(1 - gamma), rel=1e-3)
    m, only, model = one_step_chain(0.5, low=-1.0)
    assert bound_ratio(m, only, only, model, r_max=1.0) == pytest.approx(1.4142, rel=1e-3)


def test_return_identities():
    """Eq. (1): the occupancy sums to one, its reward is (1 - gamma) times the start's Q."""
    rng = np.random.default_rng(1)
    m, pi = random_mdp(rng, 0.9), simplex(rng, 4, 2)
    d = occupancy(m, pi)
    J = 0.1 * (m.mu0[:, None] * pi * q_values(m, pi)).sum()
    assert d.sum() == pytest.approx(1) and (d * m.r).sum() == pytest.approx(J)


# --- Proposition 2 and Eq. (9) ---


def operator_T(m: Mdp, d: np.ndarray, pi: np.ndarray, omega: np.ndarray) -> np.ndarray:
    """Right side of Eq. (9) divided by d(s', a')."""
    inflow = np.einsum("sat,sa->t", m.P, omega * d)
    return (m.gamma * inflow + (1 - m.gamma) * m.mu0)[:, None] * pi / d


def test_proposition_2():
    """The true ratio is the fixed point of T, and for pi near mu every step contracts to it.

    The largest error shrinks in every step by a factor below one; the error weighted by d shrinks
    at least by gamma, which also holds for policies far away.
    """
    rng = np.random.default_rng(2)
    for trial in range(50):
        m, mu = random_mdp(rng, rng.uniform(0.5, 0.95)), simplex(rng, 4, 2)
        far = 1.0 if trial % 2 else 0.02
        pi = (1 - far) * mu + far * simplex(rng, 4, 2)
        d = occupancy(m, mu)
        truth = occupancy(m, pi) / d
        np.testing.assert_allclose(operator_T(m, d, pi, truth), truth)
        omega = rng.uniform(0.1, 3, size=d.shape)
        for _ in range(30):
            after = operator_T(m, d, pi, omega)
            error, error_after = abs(omega - truth), abs(after - truth)
            assert (d * error_after).sum() <= m.gamma * (d * error).sum() + 1e-12
            if far < 1:
                assert error_after.max() < 0.999 * error.max() + 1e-12
            omega = after
        for _ in range(1000):
            omega = operator_T(m, d, pi, omega)
        np.testing.assert_allclose(omega, truth, rtol=1e-6)


def test_sup_norm_contraction_needs_a_near_policy():
    """Far from mu the largest error can grow in a step: Proposition 2's condition is not idle."""
    rng = np.random.default_rng(3)
    grew = 0
    for _ in range(50):
        m, mu = random_mdp(rng, 0.95), simplex(rng, 4, 2)
        pi = simplex(rng, 4, 2, sharpness=0.2)
        d = occupancy(m, mu)
        truth = occupancy(m, pi) / d
        error = abs(operator_T(m, d, pi, truth + 1) - truth).max()
        grew += error > 1
    assert grew > 0


# --- Eq. (10) ---


def exact_moments(m: Mdp, d, pi, omega, Q, live=None) -> tuple[float, float]:
    """Both sides of Eq. (10) by ampl.miw_moments, fed with exact conditional expectations.

    Its batch means are uniform, so omega carries the factor d * (number of pairs).
    """
    next_mass = m.P.sum(-1)  # chance not to terminate
    q_next = np.einsum("sat,tb,tb->sa", m.P, pi, Q) / next_mass
    tensor = lambda x: torch.tensor(x.reshape(1, -1), dtype=torch.float64)  # noqa: E731
    weight = tensor(omega * d * d.size)
    q_initial = (m.mu0[:, None] * pi * Q).sum(keepdims=True)
    q_next = q_next * (next_mass if live is None else live)
    sides = ampl.miw_moments(weight, weight, tensor(Q), tensor(q_next), tensor(q_initial), m.gamma)
    return sides[0].item(), sides[1].item()


@pytest.mark.parametrize("terminates", [False, True])
def test_equation_10_holds_for_any_q(terminates):
    """At the true omega the two sides agree for any Q; at omega = 1 they do not."""
    rng = np.random.default_rng(4)
    for _ in range(50):
        m, mu, pi = random_mdp(rng, 0.9), simplex(rng, 4, 2), simplex(rng, 4, 2)
        if terminates:
            m = m._replace(P=m.P * rng.uniform(0.3, 1, size=(4, 2, 1)))
        d, Q = occupancy(m, mu), rng.normal(size=(4, 2)) * 10
        left, right = exact_moments(m, d, pi, occupancy(m, pi) / d, Q)
        assert left == pytest.approx(right, abs=1e-9)
        left, right = exact_moments(m, d, pi, np.ones_like(d), Q)
        assert abs(left - right) > 1e-4
        if terminates:  # bootstrapping through terminals is wrong
            live = np.ones_like(d)
            left, right = exact_moments(m, d, pi, occupancy(m, pi) / d, Q, live)
            assert abs(left - right) > 1e-4


# --- the trainer of omega, on one-hot states and actions ---


class TableCritic(nn.Module):
    """Q_1 read from a table [S, A]."""

    def __init__(self, table: np.ndarray):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table, dtype=torch.float))

    def first(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return torch.einsum("lbs,sa,lba->lb", obs, self.table, action)


class TablePolicy(nn.Module):
    """Draws an action from pi [S, A]; tanh turns the raw action into an exact one-hot vector."""

    def __init__(self, pi: np.ndarray):
        super().__init__()
        self.cumulative = torch.tensor(pi, dtype=torch.float).cumsum(-1)[:, :-1]

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        below = self.cumulative[obs.argmax(-1)] < torch.rand(*obs.shape[:2], 1)
        number = below.sum(-1)
        return 20.0 * nn.functional.one_hot(number, self.cumulative.shape[1] + 1)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(ampl, "save_weight", lambda run, weight: None)


class StubRun:
    """Takes the place of the run folder."""

    def __init__(self):
        self.progress = {}

    def after_steps(self, *_):
        pass

    def log(self, *_):
        pass


class Toy:
    """An agent on a random MDP whose policy is better than the data's, and the exact truth."""

    def __init__(self, **changes):
        rng = np.random.default_rng(5)
        m, self.mu = random_mdp(rng, 0.8), simplex(rng, 4, 2, sharpness=3.0)
        m = m._replace(r=m.r**4)  # few large rewards, so that policies differ
        greedy = np.eye(2)[q_values(m, self.mu).argmax(-1)]
        self.pi = 0.8 * greedy + 0.2 * self.mu
        # Rounding the data to 20,000 rows changes P a little; the truth is that of the rows.
        joint = occupancy(m, self.mu)[..., None] * m.P
        counts = np.rint(20_000 * joint).astype(int)
        starts = np.rint(20_000 * m.mu0).astype(int)
        self.d = counts.sum(-1) / counts.sum()
        P, mu0 = counts / counts.sum(-1, keepdims=True), starts / starts.sum()
        self.m = m._replace(P=P, mu0=mu0)
        self.truth = occupancy(self.m, self.pi) / self.d
        s, a, t = (np.repeat(i.ravel(), counts.ravel()) for i in np.indices(counts.shape))
        columns = [np.eye(4)[s], np.eye(2)[a], self.m.r[s, a][:, None], np.eye(4)[t]]
        columns.append(np.zeros((len(s), 1)))
        self.data = torch.tensor(np.concatenate(columns, -1), dtype=torch.float)
        self.initial_obs = torch.tensor(np.eye(4)[np.repeat(np.arange(4), starts)]).float()
        settings = dict(hidden=(32, 32), miw_lr=2e-3, miw_alpha=1.0, gamma=0.8, cuda=False,
                        model_hidden=4, buffer_size=1, miw_tau=0.1)  # fmt: skip
        self.args = ampl.Args(**(settings | changes))
        self.agent = ampl.AMPL(self.args, 4, 2, CPU)
        self.agent.actor = TablePolicy(self.pi)
        self.set_q(q_values(self.m, self.pi))

    def set_q(self, table: np.ndarray) -> None:
        for name in ("critic", "critic_target", "critic_slow"):
            setattr(self.agent, name, TableCritic(table))

    def train(self, steps: int) -> None:
        for _ in range(steps):
            ampl.miw_step(self.agent, self.data, self.initial_obs, None, self.args)

    def omega(self) -> np.ndarray:
        """omega at the eight state-actions, [S, A]."""
        s, a = torch.eye(4).repeat_interleave(2, 0), torch.eye(2).repeat(4, 1)
        with torch.no_grad():
            return self.agent.omega(s[None], a[None]).numpy().reshape(4, 2)

    def residual(self, omega: np.ndarray, Q: np.ndarray) -> float:
        left, right = exact_moments(self.m, self.d, self.pi, omega, Q)
        return abs(left - right)

    def distance(self, omega: np.ndarray) -> float:
        """Mean |omega - truth| under d."""
        return (self.d * abs(omega - self.truth)).sum()


def test_trainer_with_one_q_solves_its_moment_but_does_not_identify_omega():
    """With Q of the policy the residual of Eq. (10) falls tenfold; the true ratio stays far."""
    toy, ones = Toy(), np.ones((4, 2))
    Q = q_values(toy.m, toy.pi)
    start = toy.residual(ones, Q)
    J = [(occupancy(toy.m, p) * toy.m.r).sum() for p in (toy.pi, toy.d / toy.d.sum(-1)[:, None])]
    assert start == pytest.approx(J[0] - J[1], rel=0.1) and start > 0.05
    torch.manual_seed(0)
    toy.train(500)
    omega = toy.omega()
    assert toy.residual(omega, Q) < start / 10
    assert toy.distance(omega) > 0.8 * toy.distance(ones)


def test_trainer_with_spanning_qs_recovers_the_true_ratio():
    """With a new random Q in every window the distance to the true ratio falls threefold.

    What remains is the noise of the last steps: six seeds ended between 4 and 26 % of the start.
    """
    toy, ones, rng = Toy(miw_lr=1e-3), np.ones((4, 2)), np.random.default_rng(6)
    torch.manual_seed(0)
    for _ in range(500):
        toy.set_q(2 * rng.normal(size=(4, 2)))
        toy.train(3)
    omega = toy.omega()
    assert toy.distance(omega) < toy.distance(ones) / 3
    assert np.corrcoef(omega.ravel(), toy.truth.ravel())[0, 1] > 0.9


# --- --miw-refresh ---


def test_tables_equal_the_plain_loop_without_noise():
    """With a deterministic policy and a settled slow critic a step from tables is a plain step."""
    args = ampl.Args(hidden=(8, 8), noise_std=0.0, noise_dim=2, cuda=False, model_hidden=4,
                     buffer_size=1, miw_lr=1e-2, miw_batch_size=64, num_seeds=2)  # fmt: skip
    data = torch.rand(1500, 3 + 2 + 1 + 3 + 1)
    data[:, -1] = (data[:, -1] < 0.1).float()
    initial_obs, results = torch.rand(1100, 3), []
    for use_tables in (False, True):
        agent = ampl.AMPL(args, 3, 2, CPU)
        agent.critic_slow.load_state_dict(agent.critic.state_dict())
        tables = None
        if use_tables:
            tables = ampl.QTables(*(torch.zeros(2, n) for n in (1500, 1500, 1100)))
            ampl.fill_tables(agent, tables, data, initial_obs)
        for step in range(30):
            torch.manual_seed(step)
            logs = ampl.miw_step(agent, data, initial_obs, tables, args)
        results.append([*agent.omega.parameters(), logs["losses/weight_loss"]])
    for plain, cached in zip(*results, strict=True):
        torch.testing.assert_close(plain, cached, atol=1e-5, rtol=1e-4)


def test_tables_agree_with_the_plain_loop_on_the_whole():
    """fit_weight with tables and without: the weights differ by little beside what they learned.

    The random draws differ, so the tolerance is 35 % of the distance from flat weights.
    """
    weights = []
    for refresh in (1, 100):
        toy = Toy(miw_refresh=refresh, miw_steps=500)
        run = StubRun()
        weight = ampl.fit_weight(toy.agent, toy.data, toy.initial_obs, toy.args, 1, run)
        assert run.progress["miw_step"] == 500 and weight.shape == (1, len(toy.data))
        assert weight.mean().item() == pytest.approx(1, abs=1e-4)
        weights.append(weight)
    plain, cached = weights
    assert (plain - 1).abs().mean() > 0.03
    assert (plain - cached).abs().mean() < 0.35 * (plain - 1).abs().mean()


@pytest.mark.parametrize("refresh", [1, 200, 80])
def test_slow_critic_travels_to_the_critic(refresh):
    """Q' starts at the target critic and takes a Polyak step per step, with tables or without."""
    toy = Toy(miw_refresh=refresh, miw_steps=200, miw_tau=0.01)
    toy.agent.critic_target.table.data += 4.0
    toy.agent.critic_slow.table.data += 99.0
    ampl.fit_weight(toy.agent, toy.data, toy.initial_obs, toy.args, 1, StubRun())
    gap = toy.agent.critic_slow.table - toy.agent.critic.table
    # 4 * 0.99 ** 200 = 0.5359
    torch.testing.assert_close(gap, torch.full_like(gap, 0.5359), rtol=0.01, atol=0)
