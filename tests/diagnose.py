"""Why is a score what it is? Looks into a saved run of ampl.py, mopo.py or combo.py.

    python tests/diagnose.py runs/<run>

It runs episodes in the simulator and prints, as Markdown,

- how long they last, their returns, and their discounted returns, which training is for;
- Q along them, beside the discounted return that was really still to come;
- how far the states that the policy visits lie from those that Q was trained on;
- for hopper, halfcheetah and walker2d, whose observations tell the whole state: how far the model
  is from the simulator at each step of its rollouts, from states of the data and from visited ones.

It needs the run's data and its checkpoint.pt, and changes nothing. A minute or two of a core.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, NamedTuple

import gymnasium
import numpy as np
import pandas as pd
import torch
import tyro
from scipy.spatial import KDTree
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
METHODS = {"ampl": "AMPL", "mopo": "MOPO", "combo": "COMBO"}
WHOLE_STATE = ("hopper", "halfcheetah", "walker2d")  # obs: qpos without x, then qvel
SEED = 10_000  # of the first episode; the next ones follow
# What the tables sum up: steps that an episode has left, first and last; and steps from its start.
UNTIL_END = {
    "1 to 10": (1, 10),
    "11 to 50": (11, 50),
    "51 to 200": (51, 200),
    "more": (201, np.inf),
}
FROM_START = ((0, 50), (50, 100), (100, 200), (200, 400), (400, 800), (800, 1600))


@dataclass
class Options:
    run: Annotated[str, tyro.conf.Positional]  # folder of the run
    episodes: int = 20  # number of episodes in the simulator
    states: int = 2000  # states from which the model is compared
    steps: int = 5  # steps in the model from each of them


class Episode(NamedTuple):
    """An episode of T steps in the simulator."""

    obs: Tensor  # [T, S]
    action: Tensor  # [T, A]
    reward: np.ndarray  # [T]
    terminated: bool  # by the task, and not by the time limit


# ----- the run -----
def load_run(folder: Path) -> tuple[ModuleType, nn.Module, dict]:
    """The script of a run, the method as its checkpoint has it, and the data. Raises SystemExit."""
    found = [name for name in METHODS if (folder / f"{name}.py").exists()]
    if not found:
        sys.exit(f"{folder} is no run of ampl.py, mopo.py or combo.py")
    script = importlib.import_module(found[0])
    args = script.load_args(str(folder))
    args.cuda = False
    dataset = script.load_dataset(args)
    kind = getattr(script, METHODS[found[0]])
    sizes = (dataset["obs"].shape[1], dataset["action"].shape[1])
    method = kind(args, *sizes, torch.device("cpu"))
    method.set_data(dataset)
    with script.loading(folder / "checkpoint.pt") as saved:
        if saved["kind"] != METHODS[found[0]]:
            sys.exit(f"{folder} is a run of {saved['kind']}, which this cannot read")
        script.put_back(method, saved)
        print(f"{folder}: {saved['iteration']} iterations\n")
    return script, method, dataset


def run_episode(method: nn.Module, env: gymnasium.Env, seed: int) -> Episode:
    """An episode in which the method acts as in an evaluation."""
    observations = []
    actions = []
    rewards = []
    obs, _ = env.reset(seed=seed)
    over = False
    while not over:
        obs = np.asarray(obs, np.float32)
        action = method.act(obs[None])[0]
        observations.append(obs)
        actions.append(action)
        obs, reward, terminated, truncated, _ = env.step(action)
        rewards.append(reward)
        over = terminated or truncated
    return Episode(
        torch.as_tensor(np.array(observations)),
        torch.as_tensor(np.array(actions), dtype=torch.float32),
        np.array(rewards),
        terminated,
    )


def as_trained(method: nn.Module, reward):
    """Rewards of the simulator in the units of training: AMPL's are scaled by the data's range."""
    if not hasattr(method, "reward_range"):
        return reward
    low, high = method.reward_range
    return (reward - low + 1e-3) / (high - low)


def discounted(reward: np.ndarray, gamma: float) -> np.ndarray:
    """The discounted sum of the rewards [T] from each step on. -> [T]"""
    sums = np.zeros(len(reward))
    later = 0.0
    for t in reversed(range(len(reward))):
        later = reward[t] + gamma * later
        sums[t] = later
    return sums


# ----- what is printed -----
def episode_table(script: ModuleType, method: nn.Module, episodes: list[Episode]) -> pd.DataFrame:
    """A line per episode."""
    lines = []
    for episode in episodes:
        total = episode.reward.sum()
        line = {
            "steps": len(episode.reward),
            "end": "terminated" if episode.terminated else "time limit",
            "return": total,
            script.measure_of(method.args.env_id): script.scores_of(method.args.env_id, total),
            "discounted return": discounted(episode.reward, method.args.gamma)[0],
        }
        lines.append(line)
    return pd.DataFrame(lines)


@torch.no_grad()
def value_table(method: nn.Module, episodes: list[Episode]) -> pd.DataFrame:
    """The critics' Q and what came after, by the number of steps that the episode had left.

    Near a time limit the return still to come is cut, so those states are left out. AMPL's rewards
    are scaled, and MOPO's Q has the penalty and the entropy in it.
    """
    gamma = method.args.gamma
    parts = []
    for episode in episodes:
        reward = as_trained(method, episode.reward)
        q = method.critic(episode.obs, episode.action).amin(0)
        left = np.arange(len(reward), 0, -1)
        part = pd.DataFrame({"left": left, "Q": q, "to come": discounted(reward, gamma)})
        if not episode.terminated:
            part = part[gamma**left < 0.01]
        parts.append(part)
    table = pd.concat(parts)
    lines = []
    for name, (first, last) in UNTIL_END.items():
        some = table[table["left"].between(first, last)]
        lines.append(
            {
                "steps until the end": name,
                "states": len(some),
                "min Q": some["Q"].mean(),
                "discounted return to come": some["to come"].mean(),
            }
        )
    return pd.DataFrame(lines)


def quantiles_to(name: str, tree: KDTree, states: Tensor, neighbour: int = 1) -> dict[str, float]:
    """Median and 95 % of the distance from each state to its nearest (second, ...) in a tree."""
    distances = tree.query(states, [neighbour])[0]
    return {
        f"to {name}, median": np.median(distances),
        f"to {name}, 95 %": np.quantile(distances, 0.95),
    }


def distance_table(data_obs: Tensor, model_obs: Tensor, episodes: list[Episode]) -> pd.DataFrame:
    """How far visited states are from the nearest of the data and of D_model, in data's deviations.

    Q is trained on these two alone. The first line tells what is usual within the data.
    """
    scale = data_obs.std(0).clamp(min=1e-3)
    data = KDTree(data_obs / scale)
    imagined = KDTree(model_obs / scale)
    some = data_obs[:: max(1, len(data_obs) // 1000)] / scale
    line = {"states": "of the data, to other ones", "number": len(some)}
    lines = [line | quantiles_to("data", data, some, neighbour=2)]  # the first is the state itself
    for first, last in FROM_START:
        visited = torch.cat([episode.obs[first:last] for episode in episodes]) / scale
        if len(visited) == 0:
            break
        line = {"states": f"visited, step {first} to {last}", "number": len(visited)}
        of_data = quantiles_to("data", data, visited)
        lines.append(line | of_data | quantiles_to("D_model", imagined, visited))
    return pd.DataFrame(lines)


def is_whole(env: gymnasium.Env, obs: Tensor) -> Tensor:
    """Whether observations [B, S] tell the whole state. -> bool [B]

    Those of hopper and walker2d clip velocities to 10 and -10.
    """
    velocity = obs[:, env.unwrapped.model.nq - 1 :]
    return (velocity.abs() != 10).all(-1)


def simulate(env: gymnasium.Env, obs: Tensor, action: Tensor) -> tuple[Tensor, ...]:
    """A step of the simulator from each state: reward [B], next_obs [B, S], terminated [B]."""
    simulator = env.unwrapped
    num_positions = simulator.model.nq - 1  # in an observation, which has no x
    rewards = torch.zeros(len(obs))
    next_obs = torch.zeros_like(obs)
    terminated = torch.zeros(len(obs))
    env.reset(seed=SEED)
    for i, state in enumerate(obs.double().numpy()):
        positions = np.concatenate([[0.0], state[:num_positions]])
        simulator.set_state(positions, state[num_positions:])
        after, reward, ended, _, _ = simulator.step(action[i].double().numpy())
        rewards[i] = reward
        next_obs[i] = torch.as_tensor(after)
        terminated[i] = ended
    return rewards, next_obs, terminated


@torch.no_grad()
def model_table(
    method: nn.Module, env: gymnasium.Env, name: str, obs: Tensor, unit: Tensor, steps: int
) -> pd.DataFrame:
    """Rollouts in the model from states obs [B, S], each step beside the simulator's.

    The simulator starts every step from the state where the model is, with the same action, so
    errors do not add up. They are in `unit` [S], what s' - s deviates by in the data. "ends" counts
    those of the simulator. A rollout that ends is left out of later steps.
    """
    lines = []
    for step in range(1, steps + 1):
        if len(obs) == 0:
            break
        action = method.rollout_action(obs)
        reward, next_obs, ended = method.imagine(obs, action)
        true_reward, true_next_obs, true_ended = simulate(env, obs, action)
        true_reward = as_trained(method, true_reward)
        error = ((next_obs - true_next_obs) / unit).square().mean(-1).sqrt()
        line = {
            "from": name,
            "step": step,
            "states": len(obs),
            "error of s', median": error.median().item(),
            "95 %": error.quantile(0.95).item(),
            "reward minus simulator's": (reward - true_reward).mean().item(),
            "ends": int(true_ended.sum()),
            "ends missed": int((true_ended * (1 - ended)).sum()),
            "false ends": int((ended * (1 - true_ended)).sum()),
        }
        lines.append(line)
        obs = next_obs[ended == 0]
    return pd.DataFrame(lines)


def model_tables(
    script: ModuleType, method: nn.Module, dataset: dict, episodes: list[Episode], options: Options
) -> pd.DataFrame:
    """`model_table` from states of the data and from visited ones, one after the other."""
    torch.manual_seed(0)
    env = script.make_env(method.args.env_id)
    known = dataset["has_next"]
    unit = (dataset["next_obs"] - dataset["obs"])[known].std(0)
    sources = {
        "data": dataset["obs"],
        "visited": torch.cat([episode.obs for episode in episodes]),
        "last 20 steps": torch.cat([episode.obs[-20:] for episode in episodes]),
    }
    tables = []
    for name, obs in sources.items():
        obs = obs[is_whole(env, obs)]
        some = torch.randperm(len(obs))[: options.states]
        table = model_table(method, env, name, obs[some], unit, options.steps)
        tables.append(table)
    return pd.concat(tables)


def main(options: Options) -> None:
    """Print all tables."""
    script, method, dataset = load_run(Path(options.run).expanduser())
    env = script.make_env(method.args.env_id)
    episodes = []
    for number in range(options.episodes):
        episodes.append(run_episode(method, env, SEED + number))
    imagined = method.model_data[: int(method.num_model_rows)]
    model_obs = method.split(imagined).obs
    summary = episode_table(script, method, episodes)
    tables = {
        "Episodes": summary,
        "Q and returns": value_table(method, episodes),
        "Distance to the nearest state": distance_table(dataset["obs"], model_obs, episodes),
    }
    if script.family_of(method.args.env_id) in WHOLE_STATE:
        found = model_tables(script, method, dataset, episodes, options)
        tables["Steps in the model"] = found
    for title, table in tables.items():
        print(f"\n{title}\n\n{table.to_markdown(index=False, floatfmt='.3g')}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
