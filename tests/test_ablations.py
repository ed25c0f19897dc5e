"""Each ablation is small, equals ampl.py until its idea acts, computes what it says, and runs."""

import functools
import importlib
import inspect
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import test_runs
import torch
from torch.nn.utils import parameters_to_vector

import ampl

FOLDER = Path(ampl.__file__).parent / "ablations"
# It ends the warm start after 6 iterations, mixes model data in after 7 and re-trains after 8, 16.
TINY = test_runs.TINY | dict(
    total_iterations=20, warmup_iterations=6, real_decay_every=1, model_retrain_every=8,
    rollout_every=5, eval_every=20, eval_episodes=1, final_episodes=1, checkpoint_every=20,
)  # fmt: skip
# The first iteration whose start finds another state than ampl.py's; networks that are left idle.
FIRST = dict(nw=8, uniform=8, vpm=8, gendice=8, dualdice=8, reward_test=8, value_model=8)
FIRST |= dict(no_reg=7, no_rollouts=8, gaussian=1, wpr=1, kl_wpr=1, kl=1)
IDLE = dict.fromkeys(("nw", "uniform"), {"omega", "omega_slow", "critic_slow"})
IDLE |= dict.fromkeys(("gendice", "dualdice"), {"omega_slow", "critic_slow"})
IDLE |= dict.fromkeys(("vpm", "reward_test"), {"critic_slow"})
sys.path.append(str(FOLDER))
figure2 = importlib.import_module("figure2")
MODULES = {name: importlib.import_module(f"ampl_{name}") for name in FIRST} | {"ampl": ampl}
KINDS = [ampl.AMPL, *ampl.AMPL.__subclasses__(), *MODULES["wpr"].WPR.__subclasses__()]
METHODS = {kind.__module__.removeprefix("ampl_"): kind for kind in KINDS}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """15 episodes of 20 rows, every third ends by a terminal; obs and action tell a row's number"""
    row, rng = np.arange(300), np.random.default_rng(0)
    last, terminal = row % 20 == 19, row // 20 % 3 == 0
    changes = dict(terminals=last & terminal, timeouts=last & ~terminal)
    changes["observations"] = np.stack([row / 100, *rng.normal(1, 1, (3, 300))], 1)
    changes["actions"] = np.stack([row / 400, rng.uniform(-1, 1, 300)], 1)
    return test_runs.write_dataset(tmp_path_factory.mktemp("data") / "data.hdf5", changes)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory, short_episodes):
    """run(name, **changes) trains, once for all tests. -> method, states at iterations, folder"""

    @functools.cache
    def train(name, **changes):
        place, history, seen, plain = tmp_path_factory.mktemp(name), [], [], METHODS[name].iterate

        def iterate(self, *flags):
            seen[:] = [self]
            history.append({k: v.clone() for k, v in self.state_dict().items()})
            return plain(self, *flags)

        args = MODULES[name].Args(**TINY | dict(dataset_path=dataset, run_dir=str(place)) | changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(METHODS[name], "iterate", iterate)
            patch.setattr(ampl.Run, "plot_curves", lambda self: None)  # half of the time
            ampl.train(args, METHODS[name])
        return seen[0], history, Path(args.resume or next(place.iterdir()))

    return train


def test_size_imports_and_text():
    files = {path.stem.removeprefix("ampl_"): path.read_text() for path in FOLDER.glob("ampl_*.py")}
    lines, readme = [t.count("\n") for t in files.values()], (FOLDER / "README.md").read_text()
    assert files.keys() == FIRST.keys() and max(lines) <= 130 and sum(lines) <= 900
    for name, text in files.items():
        imports = re.findall(r"^ *(?:import|from) (ampl\w*|mopo|combo)", text, re.M)
        assert imports == ["ampl"] + ["ampl_wpr"] * name.startswith("kl")
        assert f"\nRun: `python ablations/ampl_{name}.py --env-id" in MODULES[name].__doc__
        assert f"](ampl_{name}.py)" in readme
    weights = re.findall(r"class ClippedWeight.*?\n\n\n", "".join(files.values()), re.S)
    assert len(weights) == 3 and len(set(weights)) == 1


@pytest.mark.parametrize("name", FIRST)
def test_flags_without_a_meaning_are_neither_shown_nor_taken(name, capsys):
    """The others show their comments and the ablation's defaults, and the base keeps its own."""
    settings, without = MODULES[name].Args, getattr(MODULES[name].Args, "without", ())
    text, base = (test_runs.shown(capsys, x) for x in (settings, ampl.Args))
    flags = {f"--{field.replace('_', '-')}": field for field in settings.__dataclass_fields__}
    hidden = [flag for flag, field in flags.items() if field.startswith(without)]
    assert [flag for flag in flags if not re.search(f"{flag}[ ,]", text)] == hidden
    assert all(re.search(f"{flag}[ ,]", base) for flag in hidden)
    assert MODULES[name].__doc__[:40] in text
    for field, comment in re.findall(r"^    (\w+): .*  # (.+)$", inspect.getsource(settings), re.M):
        shown = f"{comment} (default: {getattr(settings, field)})" in text
        assert shown or field.startswith(without)
    for flag in hidden[:1]:
        with pytest.raises(SystemExit) as stop:
            ampl.parse_args(settings, [flag, "1"])
        assert stop.value.code == 2 and flag in capsys.readouterr().err
    assert ampl.parse_args(settings, ["--env-id", "pen-human-v1", "--tau", "0.1"]).tau == 0.1


@pytest.mark.parametrize("name, base", [*((name, "ampl") for name in FIRST), ("kl", "kl_wpr")])
def test_same_as_its_base_until_the_idea_acts(name, base, run):
    """Bit for bit; KL is KL-WPR while all weights are one."""
    first, states = FIRST[name] if base == "ampl" else 9, list(zip(run(base)[1], run(name)[1]))
    own = dict(gaussian=("actor", "buffer"), no_rollouts=("buffer", "real_rows")).get(name, "none")
    common = [k for k in states[0][0] if not k.startswith(own)]
    for i, (old, new) in enumerate(states[: first + 1]):
        assert all(torch.equal(old[k], new[k]) for k in common) == (i < first), i


@pytest.mark.parametrize("name", FIRST)
def test_all_phases_act_and_resume_is_exact(name, run):
    """Every parameter moves but those of idle networks; 12 + 8 iterations make 20."""
    (method, _, whole), (_, _, part) = run(name), run(name, total_iterations=12)
    new = METHODS[name](MODULES[name].Args(**TINY), 4, 2, torch.device("cpu"))
    idle = {k.split(".")[0] for k, p in new.named_parameters() if p.equal(method.get_parameter(k))}
    assert idle == IDLE.get(name, set())
    for key, optimizer in method.optimizers.items():
        assert key in idle or all(s["exp_avg_sq"].any() for s in optimizer.state.values()), key
    weight = torch.tensor(np.load(whole / "weight16.npy"))
    torch.testing.assert_close(weight.mean(1), torch.ones(2))
    assert torch.equal(method.weight, weight) and (weight.std() == 0) == (name in ("nw", "uniform"))
    run(name, resume=str(part))
    a, b = (torch.load(folder / "checkpoint.pt") for folder in (part, whole))
    for key in ("method", "optimizers"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


def test_figure2(run, tmp_path, capsys):
    figure2.main(f"{tmp_path}/out.png", *(str(run(name)[2]) for name in ("ampl", "vpm")))
    assert capsys.readouterr().out.count("ampl_vpm, iteration") == 2


def row(*values):  # of one learner, [1, n]
    return torch.tensor([values], dtype=torch.float64, requires_grad=True)


def check(loss, expected, *slopes):  # slopes: pairs of a tensor and its gradient
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    for tensor, slope in slopes:
        (grad,) = torch.autograd.grad(loss.sum(), tensor, retain_graph=True)
        assert grad.flatten().tolist() == pytest.approx(slope)


TAU, NU, NU_NEXT, START, V = row(1, 3), row(2, -1), row(1, 0.5), row(3, 1), row(0.5)
WEIGHT, KEEP, LOG = row(2, 0.5, 1).detach(), row(1, 1, 0).detach(), math.log


def test_dice_and_wpr_losses():
    # 0.5 * 5 - 0.75 * 2.5 - 0.25 * (0.2 * 3 + 0.8 * 1.5); norm 2 v (2 - 1) - v^2
    loss = MODULES["vpm"].vpm_loss(TAU, row(2, 1), row(0.5, 2), row(4, 2, 3), V[0] / 2, 0.8)
    check(loss, 0.175, (TAU, [-0.25, 1.125]))  # (tau - 0.75 tau') / 2
    check(MODULES["vpm"].vpm_norm(torch.tensor(2.0), V), 0.75, (V, [1]))
    # Flow 0.2 * 2 + 0.8 * 1.25, E[tau (nu + nu^2 / 4)] = (3 - 2.25) / 2, norm 0.5 - 0.125.
    J = MODULES["gendice"].gendice_objective(TAU, NU, NU_NEXT, START, V[0], 0.8)
    check(J, 1.4 - 0.375 + 0.375, (TAU, [-0.85, 0.825]), (NU, [-1, -0.75]), (V, [0.5]))
    # (1.2 - 4.2) / 2 - (1 / 3 + 9) / 2 - 0.2 * 2
    J = MODULES["dualdice"].dualdice_objective(TAU, NU, NU_NEXT, START, 0.8)
    check(J, -1.5 - 14 / 3 - 0.4, (TAU, [0.1, -5.2]), (NU, [0.5, 1.5]), (START, [-0.1, -0.1]))
    m, fake, true, label = MODULES["wpr"], row(0, LOG(3), 5), row(LOG(3), 0, 1), row(1, 0.9, 0.8)
    loss = m.weighted_generator_loss(fake, WEIGHT, KEEP)
    check(loss, (2 * LOG(2) + 0.5 * LOG(4 / 3)) / 2, (fake, [-0.5, -1 / 16, 0]))
    loss = m.weighted_discriminator_loss(true, fake, WEIGHT, KEEP, label)
    check(loss, (2 * LOG(8 / 3) + 0.5 * LOG(8)) / 4, (true, [-0.125, -0.05, 0]))


def test_kl_losses():
    """As in the paper (a constant added to T changes nothing), as released; and its supremum."""
    weighted, plain, fake, true = MODULES["kl_wpr"], MODULES["kl"], row(LOG(2), 0, 7), row(1, 3, 9)
    for mean_gap, heavy, light in ((False, LOG(4.5 / 2.5), LOG(1.5)), (True, LOG(2), LOG(2) / 2)):
        check(weighted.kl_generator_loss(fake, WEIGHT, KEEP, mean_gap), -heavy)
        check(plain.kl_generator_loss(fake, KEEP, mean_gap), -light)
        pairs = (true, fake) if mean_gap else (true + 5, fake + 5)
        loss = plain.kl_discriminator_loss(*pairs, KEEP, mean_gap)
        check(loss, light - 2, (true, [-0.5, -0.5, 0]))
        loss = weighted.kl_discriminator_loss(*pairs, WEIGHT, KEEP, mean_gap)
        check(loss, heavy - 3.5 / (2 if mean_gap else 2.5))
    p, q = row(*3 * [LOG(1.5)], LOG(0.5)), row(*2 * [LOG(1.5)], *2 * [LOG(0.5)])  # T = log p / q
    loss = plain.kl_discriminator_loss(p, q, torch.ones_like(p), False)
    check(loss, -0.75 * LOG(1.5) - 0.25 * LOG(0.5))
    for keep in (0 * KEEP, KEEP):  # no row at all, and huge T
        loss = weighted.kl_discriminator_loss(1e5 * true, 1e5 * fake, WEIGHT, keep, False)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (true, fake)))


def ring(name, **changes):
    """3 states, action 1 steps on, 0 goes to state 0; one row per pair. -> method, ratio of rows"""
    sizes = dict(num_seeds=1, gamma=0.8, miw_batch_size=256, miw_initial_batch_size=256)
    args = MODULES[name].Args(**TINY | sizes | dict(initial_states="dataset") | changes)
    method = METHODS[name](args, 3, 2, torch.device("cpu"))
    s, a, eye = torch.arange(6) // 2, torch.arange(6) % 2, torch.eye(3)
    after, pi = torch.where(a == 1, (s + 1) % 3, 0), torch.where(a == 1, 0.8, 0.2)
    data = dict(obs=eye[s], action=torch.eye(2)[a], reward=torch.arange(6.0), next_obs=eye[after])
    data |= dict(terminated=torch.zeros(6), has_next=torch.ones(6), starts=eye[:1])
    method.set_data(data)
    method.actor.forward = lambda obs: 20 * torch.eye(2)[(torch.rand(obs.shape[:2]) < 0.8).long()]
    flow, start = (after[:, None] == s) * pi, 0.2 * (s == 0) * pi  # flow: [from pair, to pair]
    return method, 6 * torch.linalg.solve(torch.eye(6) - 0.8 * flow.T, start)


@pytest.mark.parametrize("name, least, rates", [
    ("vpm", 2, dict(miw_lr=5e-3, miw_v_lr=0.2)),
    ("gendice", 5, dict(miw_lr=5e-4, miw_nu_lr=5e-3, miw_v_lr=5e-3)),
    ("dualdice", 2, dict(miw_lr=5e-3, miw_nu_lr=5e-4, miw_steps=1500)),
])  # fmt: skip
def test_known_density_ratio_is_recovered(name, least, rates):
    """At raised rates omega comes so many times nearer to the truth than omega = 1 is."""
    method, ratio = ring(name, **dict(miw_steps=1000) | rates)
    omega = method.fit_weight(1, lambda *_: None)[0]
    assert (ratio - 1).abs().mean() > least * (ratio - omega).abs().mean()


def test_vpm_power_steps():
    """In each training a_t starts at 1 and tau' is copied after steps 1, 11, ...; v is last."""
    method, slow, fast = ring("vpm", miw_lr=1e-2)[0], [], []

    def train_weight(step, k, log):
        for t in range(1, 13):
            slow.append(parameters_to_vector(method.omega_slow.parameters()))
            v, mean = method.v.item(), step()["weights/batch_mean"].item()
            fast.append(parameters_to_vector(method.omega.parameters()))
            slope = pytest.approx(2 * (v - (mean - 1)), abs=1e-5)
            assert method.t.item() == t and method.v.grad.item() == slope

    method.train_weight = train_weight
    method.fit_weight(1, None), method.fit_weight(2, None)
    for t in range(1, 24):  # copies were made after so many steps in all
        assert torch.equal(slow[t], fast[max(made for made in (1, 11, 13, 23) if made <= t) - 1])


def test_reward_is_the_test_function(monkeypatch):
    """All three terms are draws of the model, at the right pairs; the critic is not asked."""
    method, numbers, seen, plain = ring("reward_test")[0], torch.arange(3.0), [], ampl.miw_loss
    method.elites.sample = lambda obs, action: (obs @ numbers + 10 * action[..., 1], obs)
    method.actor.forward = lambda obs: 20.0 * obs[..., :2]
    method.critic, method.sample_data = None, lambda count: method.split(method.data[None])
    monkeypatch.setattr(ampl, "miw_loss", lambda *args: seen.extend(args) or plain(*args))
    method.miw_step()
    assert seen[2].tolist() == [[0, 10, 1, 11, 2, 12]]  # r_hat(s, a) = s + 10 a
    assert seen[3].tolist() == [[0, 11, 0, 2, 0, 0]]  # s' = 0, 1, 0, 2, 0, 0; a' = 1 at s' = 1
    assert not seen[4].any()  # s0 = a0 = 0


def test_value_aware_loss():
    """The reward's likelihood and |Q_1(s') - Q_1(s'_hat)|, both times omega; actions are fixed."""
    method, values = ring("value_model")[0], []
    method.value_aware = True
    x, y, weight = torch.randn(1, 3, 5, 5), torch.randn(1, 3, 5, 4), torch.rand(1, 3, 5)
    method.model.input_mean.fill_(0.3), method.model.target_std.fill_(2.0)
    method.actor.forward = lambda obs: obs[..., :2]
    method.critic.first = lambda obs, action: obs.sum(-1) + 10 * action.sum(-1)
    torch.manual_seed(3)
    (mean, log_std), noise = method.model(x), torch.randn(1, 3, 5, 4)
    for target in (y, mean + log_std.exp() * noise):
        s = x[..., :3] + 0.3 + 2 * target[..., 1:]
        values.append(s.sum(-1) + 10 * torch.tanh(s[..., :2]).sum(-1))
    nll = ((mean - y) ** 2 * torch.exp(-2 * log_std) + 2 * log_std)[..., 0]
    expected = (weight * (nll + (values[0] - values[1]).abs())).mean(-1)
    torch.manual_seed(3)
    torch.testing.assert_close(method.fit_loss(x, y, weight), expected)
    (slope,) = torch.autograd.grad(method.next_value(x, y.requires_grad_()).sum(), y)
    assert torch.equal(slope, 2.0 * torch.ones_like(y) * (torch.arange(4) > 0))


def test_wpr_pairs_stay_within_an_episode(dataset):
    """True pairs are the next row's, weighted by their own row, whose number is its weight here."""
    args = ampl.Args(**TINY | dict(dataset_path=dataset, batch_size=2000))
    method = METHODS["wpr"](args, 4, 2, torch.device("cpu"))
    method.set_data(ampl.load_dataset(args))
    method.weight.copy_(method.data[:, 0] * 100)
    method.discriminator.forward = lambda obs, raw: (100 * obs[..., 0], 400 * raw.tanh()[..., 0])
    (obs, action), _, weight, _ = method.next_pairs(True)
    torch.testing.assert_close(obs, weight + 1)
    torch.testing.assert_close(action, weight + 1, atol=1e-3, rtol=0)
    number = weight.round().long()  # the row of a time limit is gone, that of a terminal is not
    assert set((number % 20).flatten().tolist()) == set(range(19))
    assert ((number % 20 < 18) | (number // 20 % 3 == 0)).all()
