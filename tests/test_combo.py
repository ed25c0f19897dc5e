"""COMBO: the conservative critic by hand, --select; whole runs of combo.py and mopo.py."""

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import test_mopo
import torch
from test_runs import flat, saved, write_dataset

import combo
import mopo

RUN = test_mopo.SMALL | dict(
    env_id="maze2d-umaze-v1", total_iterations=12, eval_every=6, eval_episodes=1, final_episodes=2,
    log_every=4, model_max_epochs=2, rollout_every=5, threads=1, cpu_fast_matmul=False,
)  # fmt: skip


def build(**changes):
    """COMBO on 3 observations and 2 actions, one learner per setting."""
    learners = len(combo.pairs(combo.Args(**changes)))
    return test_mopo.build(combo.COMBO, num_seeds=learners, **changes)


def test_log_sum_exp_is_over_all_thirty_weighted_actions():
    """log(120) and log(29 + e^10), where 3 entries would give 2.48; softmax with weights 1/p."""
    q, density = torch.zeros(1, 2, 1, 30), torch.full((1, 1, 30), -2 * math.log(2))
    assert combo.log_sum_exp(q, density)[0, 0].tolist() == pytest.approx([4.7874917])
    q[0, 1, 0, 4] = 10.0
    value = combo.log_sum_exp(q, 0 * density).flatten().tolist()
    assert value == pytest.approx([3.4011974, 10.0013157])
    q = torch.tensor([0.0, 1.0]).repeat(2, 2, 1, 1).requires_grad_()
    value = combo.log_sum_exp(q, torch.tensor([[[0.5, 0.25]], [[1.0, 1.0]]]).log())
    assert value[0, :, 0].tolist() == pytest.approx([2.5551420] * 2)  # log(2 + 4 e)
    assert value[1, :, 0].tolist() == pytest.approx([1.3132617] * 2)
    grad = torch.autograd.grad(value.sum(), q)[0]
    assert grad[0, 1, 0].tolist() == pytest.approx([0.1553624, 0.8446376])
    assert grad[1, 0, 0].tolist() == pytest.approx([0.2689414, 0.7310586])


def test_expectation():
    """The mean over some rows; no rows give 0 and not NaN, which would end a run."""
    q = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]).repeat(2, 1, 1)
    among = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert combo.expectation(q, among).tolist() == [[2.0, 20.0], [0.0, 0.0]]


def test_proposals():
    """n each of uniform, pi(.|s), pi(.|s'), with densities that make them estimate an integral."""
    agent, n = build(num_actions=20_000), 20_000
    log_std = math.log(0.8)
    agent.actor.forward = lambda s: (0.3 * s[..., :2], torch.full_like(s[..., :2], log_std))
    obs = torch.tensor([[[1.0, -1.0, 0.0], [2.0, 0.0, 0.0]]])
    actions, density = agent.proposals(obs, -obs)
    assert combo.Args().num_actions == 10 and len(actions[0].view(-1, 2).unique(dim=0)) == 6 * n
    assert (density[..., :n] == density[0, 0, 0]).all() and actions.abs().max() <= 1
    raw = torch.atanh(actions[0, ..., 0].double()).view(6, n).mean(-1).tolist()
    assert raw == pytest.approx([0.0, 0.3, -0.3, 0.0, 0.6, -0.6], abs=0.03)  # s' is -s
    for part in (slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n)):
        q = actions[:, :, part].sum(-1).unsqueeze(1).expand(-1, 2, -1, -1)
        value = combo.log_sum_exp(q, density[:, :, part]) - math.log(n)
        # int exp(a_1 + a_2) over the square: (e - 1/e)^2 = 5.5244
        assert value[0, 0].tolist() == pytest.approx([1.7091770] * 2, abs=0.05)


@pytest.mark.parametrize("states", ["mixed", "model"])
def test_critic_gradient_is_that_of_equation_2(states):
    """Row by row: 0.5 TD^2 without entropy, + beta (log-sum-exp on rho - Q on the data rows)."""
    agent = build(select=True, select_beta=(0.5, 5.0), select_real_fraction=(0.25, 0.75),
                  rho_states=states, num_actions=2, gamma=0.9)  # fmt: skip
    torch._foreach_mul_([p.data for p in agent.critic_target.parameters()], 1.3)
    batch, propose, drawn = agent.split(torch.randn(4, 16, sum(agent.columns))), agent.proposals, []
    ends = (torch.arange(16) % 5 == 4).float().expand(4, -1)
    batch = batch._replace(action=batch.action.tanh(), terminated=ends)
    agent.proposals = lambda *states: drawn.extend((*states, *propose(*states))) or drawn[2:]
    before, critic = copy.deepcopy(agent.state_dict()), copy.deepcopy(agent.critic)
    next_action = agent.actor.sample(batch.next_obs)[0].detach()
    logs = agent.update_critic(batch, next_action, torch.zeros_like(batch.reward))
    obs, next_obs, actions, density = drawn
    count, loss, gaps = obs.shape[1], 0.0, torch.zeros(4)
    assert torch.equal(torch.stack([obs, next_obs]), torch.stack(batch[::3])[:, :, -count:])
    q_next = agent.critic_target(batch.next_obs, next_action).amin(1).detach()
    target, q = batch.reward + 0.9 * (1 - batch.terminated) * q_next, critic(*batch[:2])
    for (n, (beta, f)), j in itertools.product(enumerate(combo.pairs(agent.args)), range(2)):
        real, pushed = int(16 * f), []
        for b in range(0 if states == "mixed" else real, 16):
            at = batch.obs[:, b : b + 1]  # s, also where the action was drawn at s'
            own = [critic(at, a.expand(4, 1, 2))[n, j, 0] for a in actions[n, b - 16]]
            pushed.append((torch.stack(own) - density[n, b - 16]).exp().sum().log())
        gap = torch.stack(pushed).mean() - q[n, j, :real].mean()
        gaps[n] += gap.detach() / 2
        loss = loss + beta * gap + 0.5 * (q[n, j] - target[n]).square().mean()
    grads = torch.autograd.grad(loss, list(critic.parameters()))
    for parameter, want in zip(agent.critic.parameters(), grads):
        torch.testing.assert_close(parameter.grad, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logs["losses/conservative_gap"], gaps, atol=1e-5, rtol=1e-4)
    moved = {k for k, v in agent.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith("critic.")}


@pytest.mark.parametrize("states, expected", [("mixed", [4.875, 1.875]), ("model", [6.375, 6.375])])
def test_regularizer_by_hand(states, expected):
    """f = 1/4: rho's mean s is 4, so 1.5 (4.5 - 1.25); f = 3/4: 1.5 (2.5 - 1.25); model: s = 5."""
    pairs = dict(select=True, select_beta=(1.0,), select_real_fraction=(0.25, 0.75))
    agent = build(**pairs, rho_states=states)
    q = lambda obs, action: obs[..., 0] + action[..., 0]  # Q_2 = 2 Q_1
    agent.critic.forward = lambda *pair: torch.stack([q(*pair), 2 * q(*pair)], 1)
    agent.actor.sample = lambda obs: (torch.full((*obs.shape[:2], 2), 0.5), None)
    agent.buffer[..., :4] = torch.tensor([5.0, 0, 0, 0.9])
    agent.data[:, :4] = torch.tensor([1.0, 0, 0, 0.25])
    agent.buffer_rows.fill_(agent.buffer.shape[1])
    assert agent.regularizer().tolist() == pytest.approx(expected)


@pytest.fixture
def train(tmp_path, monkeypatch, short_episodes):
    """train(module, resume=None, **changes) -> the run's folder and result; 15 steps per episode"""
    dataset = write_dataset(tmp_path / "data.hdf5", {})

    def run(module, resume=None, **changes):
        monkeypatch.setattr(module.Run, "plot_curves", lambda run: None)
        place = tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        args = module.Args(**RUN | dict(dataset_path=dataset, run_dir=str(place)) | changes)
        if resume:
            args = dataclasses.replace(module.load_args(resume), resume=str(resume), **changes)
        result = module.train(args)
        return resume or next(place.iterdir()), result

    return run


@pytest.mark.parametrize("module", [mopo, combo])
def test_resume_is_exact(module, train):
    """6 + 6 = 12 iterations, bit for bit; --dynamics-from leads to the same end."""
    more = dict(num_seeds=2) if module is mopo else dict(select=True, select_beta=(0.5, 5.0))
    whole, result = train(module, **more)
    half, _ = train(module, total_iterations=6, **more)
    ends = train(module, half, total_iterations=12), train(module, dynamics_from=str(whole), **more)
    for folder, again in ends:
        assert again["final_scores"] == result["final_scores"]
        assert flat(saved(folder)) == flat(saved(whole))


def test_select(train):
    """A learner per pair, one model, the lowest value wins, and result.json says so."""
    pairs = dict(select=True, select_beta=(0.0, 2.0), select_real_fraction=(0.25, 0.5))
    folder, result = train(combo, **pairs)
    state, table = saved(folder)["method"], result["selection"]
    assert [row["real_fraction"] for row in table] == [0.25, 0.5] * 2
    assert state["beta"].tolist() == [0, 0, 2, 2] and state["real_rows"].tolist() == [[4], [8]] * 2
    assert state["model.heads.weight"].shape[:2] == (1, 3)
    assert all(torch.equal(x, state["elites.heads.bias"][0]) for x in state["elites.heads.bias"])
    assert result["chosen"] == np.argmin([row["regularizer"] for row in table])
    assert json.loads((folder / "result.json").read_text())["selection"] == table
    cases = (pairs | {"num_seeds": 3}, "leave out"), ({"select_beta": (1.0,)}, "add it")
    for change, words in cases:
        with pytest.raises(SystemExit, match=words):
            combo.check_args(combo.Args(**change))


def test_model_of_mopo_and_probe(train):
    """--dynamics-from takes MOPO's model, and the probe its hold-out rows, in raw units."""
    source, _ = train(mopo, seed=3, holdout_size=30, total_iterations=1)
    folder, _ = train(combo, dynamics_from=str(source))
    model, state = saved(source, "model.pt"), saved(folder)["method"]
    assert all(torch.equal(state[f"model.{name}"], x) for name, x in model["model"].items())
    best = state["model.heads.bias"][:, model["error"].argsort(-1)[0, :2]]
    assert torch.equal(state["elites.heads.bias"], best)
    out = combo.probe(combo.Args(probe_uncertainty=str(folder)))
    assert (folder / "uncertainty.png").exists() and out["rows"] == 30
    agent = combo.COMBO(combo.load_args(folder), 4, 2, torch.device("cpu"))
    agent.load_state_dict(state), agent.set_data(combo.load_dataset(agent.args))
    rows = agent.split(agent.data[agent.split_rows(285, 3, 30)[0]][None])
    mean, std = agent.elites.predict(rows.obs, rows.action)[0], agent.model.predict(*rows[:2])[1]
    truth = torch.cat([rows.reward.unsqueeze(-1), rows.next_obs - rows.obs], -1)
    assert out["error"] == pytest.approx((mean.mean(1) - truth).norm(dim=-1)[0].tolist(), rel=1e-4)
    assert out["uncertainty"] == pytest.approx(std.norm(dim=-1).amax(1)[0].tolist(), rel=1e-4)


@pytest.mark.parametrize("module", [mopo, combo])
def test_settings_of_the_paper(module):
    """A value for each flag in each row; the generalisation tasks have 3000 epochs."""
    assert {len(row) for row in module.PAPER.values()} == {len(module.PAPER_FLAGS)}
    long = [task for task, row in module.PAPER.items() if row[-1] == 3_000_000]
    assert len(module.PAPER) == 26 and long == ["halfcheetah-jump-v0", "ant-angle-v0"]
