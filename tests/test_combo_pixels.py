"""COMBO from images: equations by hand, gradients that stop, data and its faults, whole runs.

What it does in combo.py's words is tested there; test_copies.py says what that is. The task is the
dot of dot.py, so that no test needs OpenGL.
"""

import copy
import io
import json
import math
import sys
import zipfile
from pathlib import Path

import dot
import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image
from small import build_combo
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence
from torch.testing import assert_close

import combo
import combo_pixels
import sweep

TINY = dot.SMALL | {
    "sequences": 3,
    "sequence_length": 6,
    "memory_size": 8,
    "stoch_size": 3,
    "conv_depth": 2,
    "model_steps": 4,
    "model_log_every": 1,
    "pictures_every": 2,
    "rollout_starts": 20,
    "rollout_first_rows": 150,
    "model_rows": 300,
    "rollout_every": 5,
    "horizon": 3,
    "total_iterations": 12,
    "checkpoint_every": 7,
    "eval_every": 6,
    "eval_episodes": 2,
    "final_episodes": 3,
    "log_every": 1,
    "batch_size": 16,
    "hidden": (8, 8),
    "actor_hidden": (8, 8),
    "cpu_fast_matmul": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four episodes of a dot."""
    folder = tmp_path_factory.mktemp("data")
    dot.write_episodes(folder, 4)
    return folder


def args_of(data: Path, **changes) -> combo_pixels.Args:
    return combo_pixels.Args(**(TINY | {"dataset_path": str(data)} | changes))


def build(data: Path, **changes) -> combo_pixels.COMBOPixels:
    """A method with data, its latent states, and one phase of rollouts."""
    args = args_of(data, **changes)
    obs_dim = args.stoch_size + args.memory_size
    method = combo_pixels.COMBOPixels(args, obs_dim, 2, torch.device("cpu"))
    method.set_data(combo_pixels.load_dataset(args))
    method.encode_data(lambda *arguments: None)
    method.rollout()
    torch.manual_seed(1)
    return method


# ===== Equations ==================================================================================
def test_gaussian_kl():
    """KL(N(1, 2^2) || N(0, 1)) = (4 + 1 - 1 - ln 4) / 2 = 1.3069; and torch's own, in 5 numbers."""
    value = combo_pixels.gaussian_kl(*torch.tensor([[1.0], [2.0], [0.0], [1.0]]))
    assert_close(value, torch.tensor(1.3068528))
    means = torch.randn(2, 7, 5)
    stds = torch.rand(2, 7, 5) + 0.1
    own = Independent(Normal(means[0], stds[0]), 1)
    prior = Independent(Normal(means[1], stds[1]), 1)
    value = combo_pixels.gaussian_kl(means[0], stds[0], means[1], stds[1])
    assert_close(value, kl_divergence(own, prior))


def test_unit_log_density():
    """-(3 - 1)^2 / 2 = -2; torch's own has -log(2 pi) / 2 = -0.9189 besides."""
    value = combo_pixels.unit_log_density(torch.tensor(3.0), torch.tensor(1.0))
    assert value == -2
    assert_close(value - 0.5 * math.log(2 * math.pi), Normal(1.0, 1.0).log_prob(torch.tensor(3.0)))


def test_evidence_lower_bound():
    """The mean of -10 - 1 - 3 = -14 and -20 - 0 - 2 = -22 is -18."""
    image = torch.tensor([[-10.0], [-20.0]])
    reward = torch.tensor([[-1.0], [0.0]])
    kl = torch.tensor([[3.0], [2.0]])
    assert combo_pixels.evidence_lower_bound(image, reward, kl) == -18


def test_log_sum_exp():
    """ln(1 + e^2) = 2.1269; and combo.py's, where all densities are one."""
    value = combo_pixels.log_sum_exp(torch.tensor([[[0.0, 2.0]]]))
    assert_close(value, torch.tensor([[2.1269280]]))
    q = torch.randn(2, 5, 17)
    assert torch.equal(combo_pixels.log_sum_exp(q), combo.log_sum_exp(q, torch.zeros(5, 17)))


def test_policy_loss():
    """The smaller values are 1 and -3, of which the mean is -1."""
    assert combo_pixels.policy_loss(torch.tensor([[1.0, 5.0], [2.0, -3.0]])) == 1


def test_gaussian():
    """softplus(0) = 0.6931, and 0.1 more."""
    mean, std = combo_pixels.gaussian(torch.tensor([[4.0, 0.0]]))
    assert mean == 4
    assert_close(std, torch.tensor([[0.7931472]]))


@pytest.mark.parametrize("rho_states", ["mixed", "model"])
def test_the_conservative_gap_is_combos_on_the_same_numbers(data, rho_states):
    """The same states, actions, Q, f; actions of equal density."""
    ours = build(data, rho_states=rho_states, real_fraction=0.25)
    theirs = build_combo(rho_states=rho_states, real_fraction=0.25)
    batch = ours.sample_mixed()
    num_states = 16 if rho_states == "mixed" else 12
    q_rho = torch.randn(2, num_states, 5)
    q = torch.randn(2, 16)
    densities = torch.zeros(num_states, 5)
    ours.q_of_actions = lambda obs, actions: q_rho
    theirs.q_of_actions = lambda obs, actions: q_rho
    theirs.proposals = lambda obs, next_obs: (None, densities)
    gap = ours.conservative_gap(batch, q)
    assert torch.equal(gap, theirs.conservative_gap(combo.Batch(*batch), q))
    assert_close(gap, q_rho.exp().sum(-1).log().mean(1) - q[:, :4].mean(1))


def test_proposals(data):
    """n uniform actions and the policy's own, without noise."""
    method = build(data, num_actions=500)
    obs = method.sample_data(4).obs
    actions = method.proposals(obs)
    assert actions.shape == (4, 501, 2)
    assert torch.equal(actions[:, -1], method.actor(obs))
    assert_close(actions[:, :-1].mean((0, 1)), torch.zeros(2), atol=0.1, rtol=0)
    assert_close(actions[:, :-1].std((0, 1)), torch.full((2,), 3**-0.5), atol=0.05, rtol=0)
    assert not actions.requires_grad


# ===== Networks ===================================================================================
def test_shapes_of_the_convolutions():
    """Dreamer's: 64 -> 31 -> 14 -> 6 -> 2 with 1024 features at depth 32, and back to 64."""
    sides = []
    features = torch.zeros(1, 3, 64, 64)
    for layer in combo_pixels.conv_encoder(32):
        features = layer(features)
        if isinstance(layer, torch.nn.Conv2d):
            sides.append(features.shape[1:])
    assert sides == [(32, 31, 31), (64, 14, 14), (128, 6, 6), (256, 2, 2)]
    assert features.shape == (1, 1024)
    sides = []
    image = torch.zeros(1, 320)
    for layer in combo_pixels.conv_decoder(320, 32):
        image = layer(image)
        if isinstance(layer, torch.nn.ConvTranspose2d):
            sides.append(image.shape[1:])
    assert sides == [(128, 5, 5), (64, 13, 13), (32, 30, 30), (3, 64, 64)]


def test_defaults_have_lompos_sizes():
    model = combo_pixels.LatentModel(320, 6, combo_pixels.Args())
    assert [tuple(weight.shape) for weight in model.gru.parameters()][:2] == [(768, 256)] * 2
    assert model.prior.hidden.weight.shape == (7, 256, 256)
    assert model.prior.output.weight.shape == (7, 256, 128)
    assert model.posterior[0].weight.shape == (256, 1280)
    assert [layer.out_features for layer in model.reward[::2]] == [256, 256, 1]


def test_heads_are_drawn_alike_and_one_serves_a_whole_step():
    """Frequencies of 7 heads in 7000 steps: chi-squared with 6 degrees is below 22.5 with 99.9 %"""
    prior = combo_pixels.PriorHeads(7, 3, 2)
    with torch.no_grad():
        prior.hidden.weight.zero_()
        prior.output.weight.zero_()
        prior.output.bias[:, 0, 0] = torch.arange(7.0)  # a head's mean is its number
    torch.manual_seed(0)
    mean, std = prior(torch.randn(7000, 2, 3))
    assert torch.equal(mean[:, 0], mean[:, 1])
    counts = mean[:, 0, 0].long().bincount(minlength=7)
    assert ((counts - 1000) ** 2 / 1000).sum() < 22.5
    assert_close(std, torch.full_like(std, math.log(2) + 0.1))


def test_a_head_is_a_network():
    prior = combo_pixels.PriorHeads(1, 3, 2)
    memory = torch.randn(4, 5, 3)
    mean, std = prior(memory)
    hidden = torch.nn.functional.elu(memory @ prior.hidden.weight[0] + prior.hidden.bias[0, 0])
    expected = hidden @ prior.output.weight[0] + prior.output.bias[0, 0]
    assert_close(torch.cat([mean, std], -1), torch.cat(combo_pixels.gaussian(expected), -1))


def test_observe_is_step_by_step_what_act_infers(data):
    """An episode at once, and image by image: the same latent states, and the policy's actions."""
    method = build(data)
    images, actions, _ = method.sequences_from(torch.tensor([1]), torch.tensor([0]), 8)
    torch.manual_seed(5)
    belief = method.model.observe(images, actions)
    assert torch.equal(belief.obs[..., 3:], belief.memory)
    torch.manual_seed(5)
    method.forget()
    stored = method.images.unflatten(0, (4, 26))[1].numpy()
    method.actor.forward = lambda obs: actions[step + 1]  # the data's action after image `step`
    for step in range(7):
        method.act(stored[step : step + 1])
        assert_close(method.latest[0], belief.obs[step])


def test_bfloat16_is_near(data):
    exact = build(data)
    fast = build(data, conv_bfloat16=True)
    images, _, _ = exact.sequences_from(torch.tensor([0]), torch.tensor([0]), 3)
    one = exact.model.encode(images[:, 0])
    other = fast.model.encode(images[:, 0])
    assert other.dtype == torch.float32
    assert not torch.equal(one, other)
    assert_close(one, other, atol=0.02, rtol=0.05)


# ===== Gradients ==================================================================================
def copies(module: torch.nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def changed(before: dict, method: torch.nn.Module) -> set[str]:
    """The first words of the names of all that differs."""
    after = method.state_dict()
    return {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}


def test_the_policy_never_trains_the_model(data):
    method = build(data)
    before = copies(method)
    method.iterate()
    assert changed(before, method) == {"actor", "critic", "critic_target"}
    assert all(parameter.grad is None for parameter in method.model.parameters())


def test_the_model_never_sees_the_agent(data):
    method = build(data)
    before = copies(method)
    method.model_step()
    assert changed(before, method) == {"model"}
    agent = [*method.actor.parameters(), *method.critic.parameters()]
    assert all(parameter.grad is None for parameter in agent)
    idle = [name for name, weight in method.model.named_parameters() if weight.grad is None]
    assert idle == []


def test_rollouts_and_latent_states_carry_no_gradient(data):
    method = build(data)
    before = copies(method)
    method.rollout()
    assert changed(before, method) == {"model_data", "write_row", "num_model_rows"}
    assert not method.model_data.requires_grad
    assert not method.data.requires_grad


def test_the_policys_gradient_is_that_of_q(data):
    """Where Q is the action's first entry, iterations raise that entry."""
    method = build(data, beta=0.0)

    def forward(obs: Tensor, action: Tensor) -> Tensor:
        nothing = 0 * sum(weight.sum() for weight in method.critic.parameters())
        return action[:, 0].expand(2, -1) + nothing

    method.critic.forward = forward
    obs = method.data[:, :11]
    before = method.actor(obs)[:, 0].mean()
    for _ in range(5):
        method.iterate()
    assert method.actor(obs)[:, 0].mean() > before


# ===== Rollouts and batches =======================================================================
def test_a_rollout_follows_the_model(data):
    """Rows of three steps: each begins where the one before ended, with its action and reward."""
    method = build(data, rollout_noise=0.0)
    rows = method.split(method.model_data[:60].unflatten(0, (3, 20)).flatten(0, 1))
    obs = rows.obs.unflatten(0, (3, 20))
    next_obs = rows.next_obs.unflatten(0, (3, 20))
    assert torch.equal(obs[1:], next_obs[:-1])
    known = {tuple(row) for row in method.split(method.data).obs.tolist()}
    assert all(tuple(row) in known for row in obs[0].tolist())
    assert_close(rows.action, method.actor(rows.obs))
    assert_close(rows.reward, method.model.expected_reward(rows.next_obs))
    assert_close(rows.next_obs[:, 3:], method.model.remember_step(rows.obs, rows.action))
    assert rows.terminated.sum() == 0


def test_noise_of_rollouts(data):
    method = build(data, rollout_noise=0.1)
    always = torch.full((4000, 2), 0.95)
    method.actor.forward = lambda obs: always
    action = method.rollout_action(torch.zeros(4000, 11))
    assert action.max() == 1
    assert_close(action.clamp(max=0.95).std(), torch.tensor(0.0584), atol=0.004, rtol=0)


def test_rollout_phases():
    """50,000 rows of 5 x 3200 need four phases."""
    args = combo_pixels.Args(rollout_first_rows=50_000, model_rows=4000)
    method = combo_pixels.COMBOPixels(args, 320, 6, torch.device("cpu"))
    assert method.rollout_phases(0) == 4
    assert method.rollout_phases(200) == 1


def test_sequences_stay_within_an_episode(data):
    """Images are made to tell episode and step. All starts occur, up to the last one."""
    method = build(data, sequences=400)
    number = torch.arange(4 * 26)
    method.images = number.to(torch.uint8)[:, None, None, None].expand(-1, 64, 64, 3)
    method.rewards = number.float()
    images, actions, rewards = method.sample_sequences()
    assert images.shape == (6, 400, 3, 64, 64)
    assert actions.shape == (6, 400, 2)
    seen = ((images[:, :, 0, 0, 0] + 0.5) * 255).round().long()  # [6, 400]
    assert torch.equal(seen, rewards.long())
    assert torch.equal(seen, seen[0] + torch.arange(6)[:, None])
    assert (seen // 26 == seen[0] // 26).all()
    assert (seen[0] % 26).unique().tolist() == list(range(21))


def test_rows_of_d(data):
    """Row t of an episode: the state at image t, the action and the reward stored with t + 1."""
    method = build(data)
    rows = method.split(method.data)
    assert len(method.data) == 4 * 25
    assert torch.equal(rows.action, method.actions.unflatten(0, (4, 26))[:, 1:].flatten(0, 1))
    assert torch.equal(rows.reward, method.rewards.unflatten(0, (4, 26))[:, 1:].flatten())
    by_episode = rows.obs.unflatten(0, (4, 25))
    assert torch.equal(by_episode[:, 1:], rows.next_obs.unflatten(0, (4, 25))[:, :-1])
    assert torch.equal(by_episode[:, 0], method.episode_starts)
    before = method.data.clone()
    state = torch.get_rng_state()
    method.encode_data(lambda *arguments: None)
    assert torch.equal(method.data, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_reconstructions(data):
    """Five images of the open loop are the posterior's; the others know nothing of the images."""
    method = build(data)
    shown = method.reconstruct()
    assert shown.shape == (2, 3, 26, 3, 64, 64)
    assert torch.equal(shown[:, 1, :5], shown[:, 2, :5])
    assert not torch.equal(shown[:, 1, 5:], shown[:, 2, 5:])
    later = method.images.unflatten(0, (4, 26))
    later[:, 5:] = 0
    again = method.reconstruct()
    assert torch.equal(again[:, 2], shown[:, 2])
    assert not torch.equal(again[:, 1], shown[:, 1])


# ===== Data =======================================================================================
def arrays_of(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as stored:
        return {key: stored[key] for key in stored}


def with_change(key: str, row, value) -> dict:
    """A change of one entry of an array."""
    return {key: (row, value)}


FAULTS = {
    "float images": ({"image": np.zeros((26, 64, 64, 3), np.float32)}, "not uint8"),
    "other size": ({"image": np.zeros((26, 84, 84, 3), np.uint8)}, "image is .* of another task"),
    "fewer images": ({"image": np.zeros((25, 64, 64, 3), np.uint8)}, "of another task"),
    "other actions": ({"action": np.zeros((26, 3), np.float32)}, "action is .* of another task"),
    "no action": ({"action": None}, "has no action, as V-D4RL's"),
    "NaN": (with_change("reward", 7, np.nan), "reward holds NaN or infinity, first in row 7"),
    "infinity": (with_change("action", 7, np.inf), "action holds NaN or infinity, first in row 7"),
    "far action": (with_change("action", 9, 1.5), r"action in row 9 leaves \[-1, 1\]"),
    "second first": (with_change("is_first", 12, True), "is_first is True in row 12"),
    "no last": (with_change("is_last", 25, False), "is_last is False in row 25"),
    "terminal": (with_change("is_terminal", 25, True), "row 25 is terminal"),
    "words": ({"reward": np.full(26, "one")}, "reward is of type <U3 and not numbers"),
    "objects": ({"reward": np.full(26, None)}, "cannot be read, or is damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_episode_is_named_in_a_sentence(data, tmp_path, name):
    changes, message = FAULTS[name]
    dot.write_episodes(tmp_path, 2)
    arrays = arrays_of(tmp_path / "0001.npz")
    for key, change in changes.items():
        if isinstance(change, tuple):
            row, value = change
            arrays[key][row] = value
        elif change is None:
            del arrays[key]
        else:
            arrays[key] = change
    np.savez(tmp_path / "0001.npz", **arrays)
    with pytest.raises(SystemExit, match=f"0001.npz.*{message}"):
        combo_pixels.read_folder(tmp_path, 2)


def test_mixed_lengths(tmp_path):
    dot.write_episodes(tmp_path, 2)
    arrays = {key: value[:20] for key, value in arrays_of(tmp_path / "0001.npz").items()}
    arrays["is_last"][-1] = True
    np.savez(tmp_path / "0001.npz", **arrays)
    with pytest.raises(SystemExit, match="20 rows and not 26 rows, as in 0000.npz"):
        combo_pixels.read_folder(tmp_path, 2)


@pytest.mark.parametrize("content", [b"", b"no archive", "half", "flipped", "bomb"])
def test_a_damaged_file(tmp_path, content):
    """Cut, overwritten, of another kind, or one that unpacks to 4 GB."""
    dot.write_episodes(tmp_path, 2)
    file = tmp_path / "0000.npz"
    whole = file.read_bytes()
    if content == "half":
        content = whole[: len(whole) // 2]
    elif content == "flipped":
        middle = len(whole) // 3
        content = whole[:middle] + bytes(100) + whole[middle + 100 :]
    elif content == "bomb":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as parts:
            parts.writestr("image.npy", b"x" * 100)
        content = packed.getvalue().replace(b"\x64\x00\x00\x00", b"\xff\xff\xff\xf0")
    file.write_bytes(content)
    with pytest.raises(SystemExit, match="0000.npz cannot be read, or is damaged"):
        combo_pixels.read_folder(tmp_path, 2)


def test_pickles_are_never_loaded(tmp_path):
    dot.write_episodes(tmp_path, 2)
    arrays = arrays_of(tmp_path / "0000.npz")

    class Evil:
        def __reduce__(self):
            return (sys.exit, ("the file was run",))

    arrays["reward"] = np.array([Evil()], object)
    np.savez(tmp_path / "0000.npz", **arrays)
    with pytest.raises(SystemExit, match="cannot be read, or is damaged .*allow_pickle"):
        combo_pixels.read_folder(tmp_path, 2)


def test_old_files_without_is_terminal(tmp_path):
    """Dreamer's first files have the discount alone."""
    dot.write_episodes(tmp_path, 2)
    for file in tmp_path.glob("*.npz"):
        arrays = arrays_of(file)
        del arrays["is_terminal"]
        np.savez(file, **arrays)
    assert combo_pixels.read_folder(tmp_path, 2)[0]["reward"].shape == (2, 26)
    arrays["discount"][25] = 0
    np.savez(file, **arrays)
    with pytest.raises(SystemExit, match="row 25 is terminal"):
        combo_pixels.read_folder(tmp_path, 2)


def test_where_data_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    args = combo_pixels.Args(level="mixed")
    with pytest.raises(SystemExit) as stop:
        combo_pixels.find_dataset(args)
    message = str(stop.value)
    assert f"there is no {tmp_path}/vd4rl/main/walker_walk/mixed/64px" in message
    assert "hf download conglu/vd4rl --repo-type dataset --include" in message
    assert f"--local-dir {tmp_path}" in message
    assert "python collect.py --env-id walker-walk --level mixed" in message
    for name in ("medium_replay", "mixed"):  # the second comes first
        folder = tmp_path / "vd4rl/main/walker_walk" / name / "64px"
        folder.mkdir(parents=True)
        assert combo_pixels.find_dataset(args) == folder
    with pytest.raises(SystemExit, match="holds no episode"):
        combo_pixels.read_folder(folder, 6)
    with pytest.raises(SystemExit, match="name a folder with --dataset-path"):
        combo_pixels.find_dataset(combo_pixels.Args(env_id="dot:Dot-v0"))
    with pytest.raises(SystemExit, match="there is no folder"):
        combo_pixels.find_dataset(combo_pixels.Args(dataset_path=str(tmp_path / "x")))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "dot:Dat-v0"])
def test_environments_that_do_not_fit(env_id):
    with pytest.raises(SystemExit, match="only images of 64 x 64 x 3|cannot make"):
        combo_pixels.make_env(env_id)


def test_actions_must_be_those_of_the_data(monkeypatch):
    """Data are in [-1, 1], and nothing says how they were scaled."""
    half = gymnasium.spaces.Box(-0.5, 0.5, (2,), np.float32)
    monkeypatch.setattr(dot.Dot, "action_space", half)
    with pytest.raises(SystemExit, match="dot:Dot-v0: its actions must go from -1 to 1"):
        combo_pixels.make_env("dot:Dot-v0")


def test_first_actions_that_are_not_zero(data, tmp_path, capsys):
    """One note, however many there are."""
    combo_pixels.load_dataset(args_of(data))
    assert "note:" not in capsys.readouterr().out
    dot.write_episodes(tmp_path, 3)
    for file in tmp_path.glob("*.npz"):
        arrays = arrays_of(file)
        arrays["action"] = np.roll(arrays["action"], -1, 0)
        np.savez(file, **arrays)
    combo_pixels.load_dataset(args_of(tmp_path))
    assert capsys.readouterr().out.count("first actions that are not 0") == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"real_fraction": 0.0}, "a batch needs a row of data"),
        ({"real_fraction": 1.0, "rho_states": "model"}, "needs rows of D_model"),
        ({"rollout_starts": 101}, "times --horizon is larger than --model-rows"),
        ({"horizon": 10**9}, "times --horizon is larger than --model-rows"),
        ({"level": "good"}, "--level is 'good', but must be one of"),
        ({"conv_depth": 0}, "--conv-depth is 0"),
    ],
)
def test_settings_that_make_no_sense(data, changes, message):
    with pytest.raises(SystemExit, match=message):
        combo_pixels.check_args(args_of(data, **changes))


# ===== Whole runs =================================================================================
@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Path:
    """The folder of a run that nothing disturbed, pictures and all."""
    place = str(tmp_path_factory.mktemp("whole"))
    result = combo_pixels.train(args_of(data, run_dir=place, capture_video=True))
    return Path(result["folder"])


def result_of(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def weights_of(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "checkpoint.pt", weights_only=True)["method"]


def test_a_run_leaves_all_it_should(whole):
    names = {file.name for file in whole.iterdir()}
    assert names >= {
        "args.json", "checkpoint.pt", "combo_pixels.py", "curves.png", "episode.gif", "lock",
        "model.pt", "policy.pt", "reconstructions.png", "result.json",
    }  # fmt: skip
    assert Image.open(whole / "reconstructions.png").size == (600, 600)
    with Image.open(whole / "episode.gif") as film:
        assert film.size == (64, 64)
        assert film.n_frames >= 13
    result = result_of(whole)
    assert [point[0] for point in result["curve"]] == [6, 12]
    assert len(result["final_scores"]) == 3
    assert math.isfinite(result["conservative_gap"])
    assert result["measure"] == "return"


class Killed(Exception):
    """Stands in for the end of a process."""


@pytest.mark.parametrize("where", ["in the fit", "in the iterations"])
def test_a_resumed_run_is_the_undisturbed_run(data, whole, tmp_path, monkeypatch, where):
    """Bit for bit, with the latent rows of D_model."""
    if where == "in the fit":
        monkeypatch.setattr(combo_pixels, "PHASE_SAVED_EVERY", 0)
        name = "model_step"
        last_call = 3
    else:
        name = "iterate"
        last_call = 10
    step = getattr(combo_pixels.COMBOPixels, name)
    calls = []

    def dying_step(method):
        calls.append(method)
        if len(calls) > last_call:
            raise Killed
        return step(method)

    with monkeypatch.context() as patch:
        patch.setattr(combo_pixels.COMBOPixels, name, dying_step)
        with pytest.raises(Killed):
            combo_pixels.train(args_of(data, run_dir=str(tmp_path)))
    combo_pixels.release_locks()  # as the end of a process does
    (run,) = tmp_path.iterdir()
    monkeypatch.setattr(sys, "argv", ["combo_pixels.py", "--resume", str(run)])
    combo_pixels.main()
    expected = weights_of(whole)
    found = weights_of(run)
    assert expected.keys() == found.keys()
    for key in expected:
        assert torch.equal(expected[key], found[key]), key
    assert expected["num_model_rows"] > 200
    assert result_of(run)["curve"] == result_of(whole)["curve"]
    assert result_of(run)["final_scores"] == result_of(whole)["final_scores"]


def test_evaluate_gives_the_final_scores_again(whole, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["combo_pixels.py", "--evaluate", str(whole)])
    combo_pixels.main()
    mean = result_of(whole)["final_mean"]
    assert f"return over 3 episodes: {mean:.1f}" in capsys.readouterr().out


def test_dynamics_from_takes_the_model_and_fits_none(data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(combo_pixels.COMBOPixels, "fit_model", None)
    changes = {"run_dir": str(tmp_path), "dynamics_from": str(whole)}
    run = Path(combo_pixels.train(args_of(data, **changes))["folder"])
    one = weights_of(whole)
    other = weights_of(run)
    for key in one:
        if key.startswith("model."):
            assert torch.equal(one[key], other[key])


def test_dynamics_from_refuses_a_model_of_other_sizes(data, whole, tmp_path):
    """Before a folder is made. The sentence names the tensor and both shapes."""
    changes = {"run_dir": str(tmp_path / "runs"), "dynamics_from": str(whole), "memory_size": 9}
    with pytest.raises(SystemExit, match=r"there and .* here: give the flags of the model"):
        combo_pixels.train(args_of(data, **changes))
    assert not (tmp_path / "runs").exists()


def test_combos_select_reads_these_runs(whole, capsys):
    """The offline rule for beta, which the paper does not give for images."""
    assert combo.select((str(whole), str(whole))) == str(whole)
    assert "real_fraction" in capsys.readouterr().out


def test_help_says_whose_the_defaults_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["combo_pixels.py", "--help"])
    with pytest.raises(SystemExit):
        combo_pixels.main()
    text = " ".join(capsys.readouterr().out.split())
    assert "Defaults are those of LOMPO's code, unless it says (ours)" in text
    for word in ("mixed is M-R", "beta", "(ours"):
        assert word in text


def test_sweep_takes_the_script(data, tmp_path, monkeypatch, capsys):
    """It plans runs over levels and beta; `dot` is found as a module of one's own."""
    words = ["sweep.py", "run", "--scripts", combo_pixels.__file__, "--env-ids", "dot:Dot-v0"]
    grid = ["--grid", "beta=0.5,1", "level=mixed,expert", "--dir", str(tmp_path), "--dry-run"]
    monkeypatch.setattr(sys, "argv", [*words, *grid, "--", "--dataset-path", str(data)])
    sweep.main()
    planned = capsys.readouterr().out
    assert planned.count("combo_pixels.py --env-id dot:Dot-v0") == 4
    assert planned.count("--level expert") == 2


def test_it_learns_to_steer_the_dot(tmp_path):
    """Measured on seeds 0, 1 and 2: 8.2, 19.0 and 18.6; the data has 4.0, an expert 21.1."""
    result = dot.learn(dot.SHORT, tmp_path, 1)
    assert result["data_score"] == pytest.approx(4.0, abs=0.1)
    assert result["final_mean"] > 8
