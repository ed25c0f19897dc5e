"""What a researcher adds to ampl.py: five extensions, each at most 45 lines of code.

Every one of them trains, goes on after an interruption bit for bit, and scores the same when its
policy is loaded from policy.pt. Below them stand the mistakes that a hurried researcher makes,
which must be said and not trained in silence.
"""

import dataclasses
import inspect
import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ampl

# Everything small: a run takes seconds and learns nothing.
SMALL = {
    "total_iterations": 12,
    "warmup_iterations": 4,
    "real_decay_every": 2,
    "model_retrain_every": 5,
    "model_epoch_steps": 3,
    "model_max_epochs": 2,
    "model_hidden": 8,
    "hidden": (8, 8),
    "noise_dim": 2,
    "batch_size": 16,
    "rollout_every": 4,
    "rollout_rows": 30,
    "buffer_size": 60,
    "omega_steps": 3,
    "omega_batch_size": 8,
    "omega_initial_batch_size": 8,
    "initial_states": "dataset",
    "eval_every": 6,
    "eval_episodes": 2,
    "final_episodes": 2,
    "log_every": 3,
    "checkpoint_every": 4,
    "cpu_fast_matmul": False,
    "threads": 1,
}


def arrays_of(env_id: str, rows: int) -> dict[str, np.ndarray]:
    """D4RL's arrays from random actions in an environment, with the true s' of every row."""
    env = ampl.make_env(env_id)
    rng = np.random.default_rng(0)
    columns = {
        "observations": [],
        "next_observations": [],
        "actions": [],
        "rewards": [],
        "terminals": [],
        "timeouts": [],
    }
    obs, _ = env.reset(seed=0)
    for step in range(rows):
        action = rng.uniform(-1, 1, env.action_space.shape)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        truncated = truncated or (step % 50 == 49 and not terminated)
        row = (obs, next_obs, action, reward, terminated, truncated)
        for column, value in zip(columns.values(), row):
            column.append(value)
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()
    return {key: np.array(column) for key, column in columns.items()}


def tensors_of(run: str) -> dict[str, Tensor]:
    """All tensors of a run's last checkpoint, by name."""
    checkpoint = torch.load(Path(run) / "checkpoint.pt", weights_only=True)
    tensors = dict(checkpoint["method"])
    for name, optimizer in checkpoint["optimizers"].items():
        for number, state in optimizer["state"].items():
            for key, value in state.items():
                tensors[f"{name}.{number}.{key}"] = value
    return tensors


def check(tmp_path, env_id: str, settings: type, method: type, **flags) -> dict:
    """Train, interrupt and resume, load the policy; all must agree. -> the result of the run"""
    arrays = arrays_of(env_id, 200)
    args = ampl.task_args(env_id, settings, **(SMALL | {"run_dir": str(tmp_path / "a")} | flags))
    whole = ampl.train(args, method, arrays)

    first_part = dataclasses.replace(args, total_iterations=8, run_dir=str(tmp_path / "b"))
    folder = ampl.train(first_part, method, arrays)["folder"]
    resumed = ampl.train(dataclasses.replace(args, resume=folder), method, arrays)
    one, two = tensors_of(whole["folder"]), tensors_of(resumed["folder"])
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert resumed["final_scores"] == whole["final_scores"]

    policy = ampl.load_policy(whole["folder"], settings, method)
    scores = ampl.evaluate(policy, args, args.final_episodes, 0)
    assert scores.tolist() == whole["final_scores"]
    return whole


def lines_of_code(*objects) -> int:
    """Lines of source without blank lines and comments."""
    count = 0
    for thing in objects:
        for line in inspect.getsource(thing).splitlines():
            stripped = line.strip()
            if stripped and not stripped.startswith("#"):
                count += 1
    return count


# ----- 1. ten critics -----
@dataclasses.dataclass
class TenCriticsArgs(ampl.Args):
    num_critics: ampl.Count = 10  # critics (REDQ)

    without = ("q_min_weight",)


class TenCritics(nn.Module):
    """K critics: all their values, and the first one for the training of omega."""

    def __init__(self, obs_dim: int, action_dim: int, args: TenCriticsArgs):
        super().__init__()
        critics = [ampl.mlp(obs_dim + action_dim, args.hidden, 1) for _ in range(args.num_critics)]
        self.critics = nn.ModuleList(critics)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """[B, S], [B, A] -> [K, B]."""
        x = torch.cat([obs, action], -1)
        return torch.cat([critic(x) for critic in self.critics], -1).T

    def q1_only(self, obs: Tensor, action: Tensor) -> Tensor:
        """[B, S], [B, A] -> [B]."""
        return self.critics[0](torch.cat([obs, action], -1)).squeeze(-1)


class REDQ(ampl.AMPL):
    """A target takes the minimum over a random pair; the policy raises the mean of all."""

    Critic = TenCritics

    @torch.no_grad()
    def q_target(self, batch: ampl.Batch) -> Tensor:
        q_next = self.critic_target(batch.next_obs, self.actor_target(batch.next_obs))
        pair = torch.rand(len(q_next), device=self.device).argsort()[:2]
        smallest = q_next[pair].amin(0, keepdim=True)  # one value, so that min and max agree
        return ampl.conservative_target(batch, smallest, self.args)

    def q_policy(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.critic(obs, action).mean(0)


def test_ten_critics(tmp_path):
    """All ten of them move, and so do their targets."""
    result = check(tmp_path, "Pendulum-v1", TenCriticsArgs, REDQ)
    torch.manual_seed(0)
    ampl.reseed(0, "critic")
    start = TenCritics(3, 1, ampl.task_args("Pendulum-v1", TenCriticsArgs, **SMALL))
    end = tensors_of(result["folder"])
    for name, tensor in start.state_dict().items():
        assert not torch.equal(tensor, end[f"critic.{name}"]), name
        assert not torch.equal(tensor, end[f"critic_target.{name}"]), name


# ----- 2. a deterministic policy with TD3+BC's loss, and no discriminator -----
@dataclasses.dataclass
class TD3BCArgs(ampl.Args):
    q_coef: ampl.NonNegative = 2.5  # alpha of TD3+BC
    eval_candidates: ampl.Count = 1  # all would be the same action

    without = ("noise_", "discriminator_lr", "true_label_min", "eval_candidates")


class DeterministicPolicy(nn.Module):
    """a = tanh(net(s))."""

    def __init__(self, obs_dim: int, action_dim: int, args: TD3BCArgs):
        super().__init__()
        self.net = ampl.mlp(obs_dim, args.hidden, action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        """[B, S] -> [B, A]."""
        return torch.tanh(self.net(obs))


class TD3BC(ampl.AMPL):
    """The regularizer is the squared distance to the data's actions."""

    Policy = DeterministicPolicy

    def gan_losses(self, batch: ampl.Batch, step_actor: bool) -> tuple[Tensor, None]:
        data = self.sample_data(self.args.batch_size)  # `batch` has the model's rows, too
        with torch.set_grad_enabled(step_actor):
            return F.mse_loss(self.actor(data.obs), data.action), None


def test_td3bc(tmp_path):
    check(tmp_path, "Pendulum-v1", TD3BCArgs, TD3BC)


# ----- 3. an end of episodes that the model learns -----
@dataclasses.dataclass
class LearnedEndArgs(ampl.Args):
    end_coef: ampl.NonNegative = 1.0  # weight of the cross-entropy of `terminated` in the fit


class EndingModel(ampl.ModelEnsemble):
    """One more output, the logit of `terminated`, and one more target, `terminated` itself."""

    def __init__(self, obs_dim: int, action_dim: int, args: LearnedEndArgs, members: int):
        super().__init__(obs_dim, action_dim, args, members)
        n_out = 2 * (1 + obs_dim) + 1
        self.layers[-1] = ampl.EnsembleLinear(members, args.model_hidden, n_out)

    def standardise(self, batch: ampl.Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = super().standardise(batch)
        return inputs, torch.cat([targets, batch.terminated[:, None]], -1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = self.outputs(x)
        mean, log_std = self.gaussian(outputs[..., :-1])
        return mean, log_std, outputs[..., -1]

    @torch.no_grad()
    def sample(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_std, end_logit = self.predict(obs, action)
        reward, next_obs = self.draw(obs, mean, log_std)
        return reward, next_obs, torch.rand_like(end_logit) < end_logit.sigmoid()


class LearnedEnd(ampl.AMPL):
    Model = EndingModel

    def fit_loss(self, x: Tensor, y: Tensor, omega: Tensor) -> Tensor:
        mean, log_std, end_logit = self.model(x)
        entropy = F.binary_cross_entropy_with_logits(end_logit, y[..., -1], reduction="none")
        end_loss = (omega * entropy).mean(-1)
        return ampl.model_loss(mean, log_std, y[..., :-1], omega) + self.args.end_coef * end_loss

    def judge(self, x: Tensor, y: Tensor, omega: Tensor) -> Tensor:
        return ampl.model_error(self.model(x)[0], y[..., :-1], omega)

    def imagine(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reward, next_obs, ended = self.elites.sample(obs, action)
        reward, terminated = self.end_outside_data(reward, next_obs, ended)
        return reward, next_obs, terminated


def test_learned_end(tmp_path):
    check(tmp_path, "hopper-medium-v2", LearnedEndArgs, LearnedEnd)


# ----- 4. a task of one's own, with its rule of ending, references and step limit -----
class Point(gymnasium.Env):
    """A point on a plane that is pushed about; an episode ends within 0.5 of the origin."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(1, 2, 2)
        return self.position, {}

    def step(self, action):
        self.position = self.position + 0.1 * np.asarray(action)
        reached = bool(np.linalg.norm(self.position) < 0.5)
        return self.position, float(reached) - 0.01 * self.position.sum(), reached, False, {}


def at_origin(next_obs: Tensor) -> Tensor:
    """[..., 2] -> bool [...]."""
    return next_obs.norm(dim=-1) < 0.5


@pytest.fixture
def point_task(monkeypatch):
    """The task is called point-v0. Its id stands in three tables of ampl.py."""
    gymnasium.register("point-v0", entry_point=Point, max_episode_steps=30)
    monkeypatch.setitem(ampl.ENDS, "point-v0", at_origin)
    monkeypatch.setitem(ampl.REFERENCES, "point-v0", (-1.0, 1.0))
    monkeypatch.setitem(ampl.PAPER, "point-v0", (2, 3, 0.5, 1.0))
    yield "point-v0"
    del gymnasium.registry["point-v0"]


def test_a_task_of_ones_own(tmp_path, point_task):
    """The step limit, references, rule of ending and PAPER's row are the task's own."""
    settings = SMALL | {"run_dir": str(tmp_path)}
    del settings["noise_dim"]
    args = ampl.task_args(point_task, **settings)
    assert (args.horizon, args.noise_dim, args.omega_power) == (2, 3, 0.5)
    result = check(tmp_path, point_task, ampl.Args, ampl.AMPL)
    returns = np.array(result["final_scores"]) / 100 * 2 - 1  # from references -1 and 1
    assert (returns < 1).all() and (returns > -0.01 * 30 * 10).all()

    states = torch.tensor([[0.3, 0.3], [0.6, 0.0]])
    assert ampl.known_termination(point_task, states).tolist() == [True, False]


# ----- 5. a notebook: arrays in place of a file, a class of one's own, a policy in hand -----
class Mine(ampl.AMPL):
    """The policy raises the mean of both critics."""

    def q_policy(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.critic(obs, action).mean(0)


def test_notebook(tmp_path):
    result = check(tmp_path, "Pendulum-v1", ampl.Args, Mine)
    policy = ampl.load_policy(result["folder"], method=Mine)
    action = policy.act(np.zeros((5, 3)))
    assert action.shape == (5, 1) and np.abs(action).max() <= 1
    saved = json.loads((Path(result["folder"]) / "result.json").read_text())
    assert saved["folder"] == result["folder"] and saved["dataset"] == "arrays"


@pytest.mark.parametrize(
    "objects",
    [
        (TenCriticsArgs, TenCritics, REDQ),
        (TD3BCArgs, DeterministicPolicy, TD3BC),
        (LearnedEndArgs, EndingModel, LearnedEnd),
        (Point, at_origin),
        (Mine,),
    ],
)
def test_extensions_are_short(objects):
    assert lines_of_code(*objects) <= 45


# ----- mistakes that must not pass in silence -----
def train_small(tmp_path, method: type, settings: type = ampl.Args, **flags) -> dict:
    flags = SMALL | {"run_dir": str(tmp_path)} | flags
    args = ampl.task_args("Pendulum-v1", settings, **flags)
    return ampl.train(args, method, arrays_of("Pendulum-v1", 200))


def test_a_network_without_an_optimizer(tmp_path):
    """It would keep its first weights for good."""

    class Forgotten(ampl.AMPL):
        def __init__(self, *args):
            super().__init__(*args)
            self.extra = nn.Linear(3, 1)

    with pytest.raises(SystemExit, match="no optimizer moves extra.weight"):
        train_small(tmp_path, Forgotten)


def test_a_critic_that_no_loss_reaches(tmp_path, capsys):
    """The third critic has an optimizer, but the loss takes only the first two."""

    class Three(TenCritics):
        def forward(self, obs, action):
            return super().forward(obs, action)[:2]

    class Unreached(REDQ):
        Critic = Three

    train_small(tmp_path, Unreached, TenCriticsArgs)
    sentence = "note: no loss has reached critic.critics.2.0.weight so far, which critic_optimizer"
    assert sentence in capsys.readouterr().out


def test_nothing_is_said_of_a_network_that_moves(tmp_path, capsys):
    train_small(tmp_path, REDQ, TenCriticsArgs)
    assert "no loss has reached" not in capsys.readouterr().out


def with_column(network: type) -> type:
    """The network, but its outputs [B] as [B, 1], as they are without .squeeze(-1)."""

    class Column(network):
        def forward(self, *inputs):
            return super().forward(*inputs)[:, None]

    return Column


class ColumnDiscriminator(ampl.AMPL):
    Discriminator = with_column(ampl.Discriminator)


class ColumnOmega(ampl.AMPL):
    Omega = with_column(ampl.OmegaNetwork)


class ColumnTarget(ampl.AMPL):
    def q_target(self, batch):
        return super().q_target(batch)[:, None]


class OneValue(ampl.AMPL):
    """The policy's value as a mean, which is sound; the target as a mean, which is not."""

    def q_target(self, batch):
        return super().q_target(batch).mean()


class ColumnFit(ampl.AMPL):
    def fit_loss(self, x, y, omega):
        mean, _ = self.model(x)
        return (mean - y).square().mean((0, 2))[:, None] * omega[0]


COLUMNS = [ColumnDiscriminator, ColumnOmega, ColumnTarget, OneValue, ColumnFit]


@pytest.mark.parametrize("method", COLUMNS, ids=lambda method: method.__name__)
def test_shapes_that_torch_would_stretch(method, tmp_path):
    """[B, 1] meets [B], or a number meets [B] in a loss: a sentence with the line of code."""
    with pytest.raises(SystemExit, match=r"\.py, line \d+, combines shapes \[.*\] and \[") as stop:
        train_small(tmp_path, method)
    assert "\n" not in stop.value.code


def test_all_pairs_that_are_meant(tmp_path):
    """Written out on both sides they pass, and so does a layer with one input."""

    class Pairs(ampl.AMPL):
        def gan_losses(self, batch, step_actor):
            regularizer, disc_loss = super().gan_losses(batch, step_actor)
            value = batch.reward
            distance = (value[:, None] - value[None, :]).abs().mean()
            weight = torch.ones(len(value), 1)
            layer = F.linear(value[:, None], weight, torch.zeros(len(value))).mean()
            return regularizer + 0 * distance + 0 * layer, disc_loss

    train_small(tmp_path, Pairs)


def test_critics_in_a_list(tmp_path):
    """torch would neither move nor save them."""

    class Listed(ampl.TwinCritic):
        def __init__(self, obs_dim, action_dim, args):
            super().__init__(obs_dim, action_dim, args)
            self.more = [ampl.mlp(obs_dim + action_dim, args.hidden, 1)]

    class Hidden(ampl.AMPL):
        Critic = Listed

    with pytest.raises(SystemExit, match="critic.more hides networks from torch"):
        train_small(tmp_path, Hidden)


def test_a_network_that_only_the_actors_optimizer_moves(tmp_path):
    """The policy's backward pass reaches whatever its optimizer holds, not the actor alone."""

    class Encoder(ampl.AMPL):
        def __init__(self, *args):
            super().__init__(*args)
            self.encoder = nn.Linear(3, 3).to(self.device)
            self.actor_optimizer.add_param_group({"params": list(self.encoder.parameters())})

        def gan_losses(self, batch, step_actor):
            batch = batch._replace(obs=self.encoder(batch.obs))
            regularizer, disc_loss = super().gan_losses(batch, step_actor)
            return regularizer + self.encoder(batch.obs).square().mean(), disc_loss

    result = train_small(tmp_path, Encoder)
    optimizer = torch.load(Path(result["folder"]) / "checkpoint.pt", weights_only=True)
    assert len(optimizer["optimizers"]["actor_optimizer"]["state"]) == 6 + 2


def test_settings_that_lack_the_papers_row(tmp_path, capsys):
    """`Args(env_id=...)` has the defaults, and says so; `task_args` has the paper's row."""
    args = ampl.Args(env_id="pen-human-v1")
    ampl.note_changes(args)
    said = capsys.readouterr().out
    assert "horizon is 3 and not 1" in said and "noise_std is 1.0 and not 0.001" in said
    ampl.note_changes(ampl.task_args("pen-human-v1"))
    assert capsys.readouterr().out == ""


def test_a_derived_default_is_kept():
    """A derived class's own default goes before PAPER's, a flag before both."""

    @dataclasses.dataclass
    class Long(ampl.Args):
        horizon: ampl.Count = 7

    assert ampl.task_args("pen-human-v1", Long).horizon == 7
    assert ampl.task_args("pen-human-v1", Long, horizon=2).horizon == 2
    assert ampl.task_args("pen-human-v1", Long).noise_dim == 1


def test_a_default_that_has_no_effect():
    """Without @dataclass, or without a type, a new default changes nothing."""

    class Undecorated(ampl.Args):
        gamma: ampl.Share = 0.9

    @dataclasses.dataclass
    class Untyped(ampl.Args):
        gamma = 0.9

    for settings in (Undecorated, Untyped):
        with pytest.raises(SystemExit, match=f"gamma in {settings.__name__} has no effect"):
            ampl.check_args(settings())


def test_resume_takes_the_runs_settings(tmp_path):
    """Also where `train` is called with others, not only on the command line."""
    folder = train_small(tmp_path, ampl.AMPL)["folder"]
    with pytest.raises(SystemExit, match="--resume takes --gamma from the run"):
        train_small(tmp_path, ampl.AMPL, resume=folder, gamma=0.5)


def test_a_goal_whose_reward_is_never_seen(tmp_path, capsys):
    """Without next_observations the reward at terminals is lost, and here it is the only one."""
    arrays = arrays_of("hopper-medium-v2", 200)
    arrays["rewards"] = arrays["terminals"].astype(np.float32)
    args = ampl.task_args("hopper-medium-v2", **(SMALL | {"run_dir": str(tmp_path)}))
    ampl.train(args, arrays=arrays)
    del arrays["next_observations"]
    with pytest.raises(SystemExit, match="all rewards whose s' is stored are equal"):
        ampl.train(args, arrays=arrays)


def test_args_are_checked_in_a_notebook_too(tmp_path):
    with pytest.raises(SystemExit, match="--gamma is 2.0, but must be at least 0 and at most 1"):
        train_small(tmp_path, ampl.AMPL, gamma=2.0)
    with pytest.raises(SystemExit, match="--initial-states is 'data-set', but must be one of"):
        train_small(tmp_path, ampl.AMPL, initial_states="data-set")
    with pytest.raises(SystemExit, match="but must have 2 numbers"):
        train_small(tmp_path, ampl.AMPL, hidden=(8, 8, 8))
    with pytest.raises(SystemExit, match="--model-weight-decay needs a number for each"):
        train_small(tmp_path, ampl.AMPL, model_weight_decay=(1e-5, 1e-5))


def test_another_class_is_refused(tmp_path):
    """Neither --resume nor load_policy takes the run of another class."""
    folder = train_small(tmp_path, Mine)["folder"]
    with pytest.raises(SystemExit, match="is a run of Mine, not of AMPL"):
        ampl.load_policy(folder)
    with pytest.raises(SystemExit, match="is a run of Mine, not of AMPL"):
        train_small(tmp_path, ampl.AMPL, resume=folder)


def test_terminals_that_the_fit_never_sees(tmp_path, capsys):
    """Without next_observations the s' of a terminal row is unknown: say how many there are."""
    arrays = arrays_of("hopper-medium-v2", 200)
    del arrays["next_observations"]
    flags = SMALL | {"run_dir": str(tmp_path)}
    ampl.train(ampl.task_args("hopper-medium-v2", **flags), arrays=arrays)
    count = int(arrays["terminals"].sum())
    assert f"s' of {count} terminals is not stored" in capsys.readouterr().out


def test_networks_deep_in_a_dict(tmp_path):
    """As deep as they may lie."""

    class Deep(ampl.AMPL):
        def __init__(self, *args):
            super().__init__(*args)
            self.extra = {"heads": [[nn.Linear(3, 1)]]}

    with pytest.raises(SystemExit, match="extra hides networks from torch"):
        train_small(tmp_path, Deep)


# Arrays that cannot be meant, as changes of sound ones, and what is said.
ODD_ARRAYS = [
    (lambda a: {"rewards": 1e-6 * a["rewards"]}, "rewards differ by less than 0.001"),
    (lambda a: {"rewards": np.ma.masked_less(a["rewards"], -5)}, "rewards has masked entries"),
]


@pytest.mark.parametrize("change, words", ODD_ARRAYS)
def test_odd_arrays(change, words, tmp_path):
    arrays = arrays_of("Pendulum-v1", 200)
    arrays.update(change(arrays))
    args = ampl.task_args("Pendulum-v1", **(SMALL | {"run_dir": str(tmp_path)}))
    with pytest.raises(SystemExit, match=words):
        ampl.train(args, arrays=arrays)


def test_the_hash_of_arrays_tells_their_names_apart():
    """The same bytes as time limits and as terminals are other data."""
    arrays = arrays_of("Pendulum-v1", 200)
    del arrays["terminals"]
    args = ampl.task_args("Pendulum-v1")
    one = ampl.load_dataset(args, arrays)
    arrays["terminals"] = arrays.pop("timeouts")
    two = ampl.load_dataset(args, arrays)
    assert one["source"]["sha256"] != two["source"]["sha256"]


# Rules of ending that would train something else, and what is said.
ODD_RULES = [
    (lambda next_obs: next_obs.norm(dim=-1, keepdim=True) < 0.5, r"torch.bool \[\d+, 1\] for"),
    (lambda next_obs: (next_obs > 1.02).sum(-1), "must give a bool per state"),
    (lambda next_obs: (next_obs > 5).any(), r"torch.bool \[\] for .* such as .*any\(-1\)"),
    (lambda next_obs: bool(next_obs[0, 0] > 5), "gives bool: it must give a bool per state"),
    (lambda next_obs: True if next_obs[..., 0] > 5 else False, "does not work .* such as"),
    (lambda next_obs: next_obs.mul_(0.5)[..., 0] < 0, "changes the states"),
]


@pytest.mark.parametrize("rule, words", ODD_RULES)
def test_odd_rules_of_ending(rule, words, point_task, monkeypatch):
    monkeypatch.setitem(ampl.ENDS, point_task, rule)
    with pytest.raises(SystemExit, match=words):
        ampl.load_dataset(ampl.task_args(point_task), arrays_of(point_task, 200))


def test_initial_states_are_copies(point_task, monkeypatch):
    """An environment may return the same array from every reset."""
    buffer = np.zeros(2)
    reset = Point.reset

    def reused(self, **options):
        buffer[:] = reset(self, **options)[0]
        return buffer, {}

    monkeypatch.setattr(Point, "reset", reused)
    args = ampl.task_args(point_task, num_initial_states=20)
    method = ampl.AMPL(args, 2, 2, torch.device("cpu"))
    states = method.collect_initial_obs(lambda *_: None)
    assert len(states.unique(dim=0)) == 20
