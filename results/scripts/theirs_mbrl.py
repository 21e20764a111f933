"""Time functions of mbrl-lib in its own environment; started by beside_mbrl.py.

Each line on standard input names a function, which is called once; its name is printed afterwards.
"""

import sys
import types

import gymnasium
import numpy as np
import torch
from mbrl.algorithms.mbpo import rollout_model_and_populate_sac_buffer
from mbrl.models import GaussianMLP, ModelEnv, ModelTrainer, OneDTransitionRewardModel
from mbrl.planning.sac_wrapper import SACAgent
from mbrl.third_party.pytorch_sac_pranz24 import SAC
from mbrl.util import ReplayBuffer
from mbrl.util.common import get_basic_buffer_iterators

#: Sizes that beside_mbrl.py passes.
OBS, ACTION, MEMBERS, ELITES, WIDTH, DEPTH, BATCH, HIDDEN, *SIZES = map(int, sys.argv[1:])
SYNTHETIC, FIT_STEPS, UPDATES, MATMULS, COMPILE = SIZES
EPOCHS = 2
TRANSITIONS = FIT_STEPS // EPOCHS * BATCH


def filled_buffer() -> ReplayBuffer:
    """Return a replay buffer of random transitions."""
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(TRANSITIONS, (OBS,), (ACTION,), rng=rng)
    obs, next_obs = rng.normal(size=(2, TRANSITIONS, OBS)).astype(np.float32)
    action = rng.uniform(-1, 1, (TRANSITIONS, ACTION)).astype(np.float32)
    never = np.zeros(TRANSITIONS, bool)
    buffer.add_batch(obs, action, next_obs, rng.normal(size=TRANSITIONS), never, never)
    return buffer


def main() -> None:
    torch.set_num_threads(1)
    space = gymnasium.spaces.Box(-1, 1, (ACTION,), np.float32)
    options = {
        "gamma": 0.99,
        "tau": 0.005,
        "alpha": 0.2,
        "policy": "Gaussian",
        "target_update_interval": 1,
        "automatic_entropy_tuning": True,
        "target_entropy": -ACTION / 2,
        "hidden_size": HIDDEN,
        "lr": 3e-4,
        "device": torch.device("cpu"),
    }
    sac = SAC(OBS, space, types.SimpleNamespace(**options))
    agent, buffer = SACAgent(sac), filled_buffer()
    network = GaussianMLP(
        OBS + ACTION,
        OBS + 1,
        "cpu",
        num_layers=DEPTH,
        ensemble_size=MEMBERS,
        hid_size=WIDTH,
        propagation_method="random_model",
        learn_logvar_bounds=True,
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )
    if COMPILE:
        for module in (network, sac.critic, sac.critic_target, sac.policy):
            module.forward = torch.compile(module.forward)
    model = OneDTransitionRewardModel(
        network, target_is_delta=True, normalize=True, num_elites=ELITES
    )
    model.update_normalizer(buffer.get_all())
    trainer = ModelTrainer(model, optim_lr=1e-3, weight_decay=1e-5)
    data, _ = get_basic_buffer_iterators(buffer, BATCH, 0, ensemble_size=MEMBERS)
    model.set_elite(range(ELITES))
    env = types.SimpleNamespace(
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32),
        action_space=space,
    )
    model_env = ModelEnv(
        env,
        model,
        lambda action, next_obs: torch.zeros(len(next_obs), 1, dtype=torch.bool),
        generator=torch.Generator().manual_seed(0),
    )
    synthetic = ReplayBuffer(SYNTHETIC, (OBS,), (ACTION,))
    obs = np.zeros(OBS, np.float32)

    def fit() -> None:
        trainer.train(data, num_epochs=EPOCHS, evaluate=False, silent=True)

    def updates() -> None:
        for step in range(UPDATES):
            sac.update_parameters(buffer, BATCH, step, reverse_mask=True)

    def rollout() -> None:
        rollout_model_and_populate_sac_buffer(
            model_env, buffer, agent, synthetic, True, 1, SYNTHETIC
        )

    def act() -> None:
        agent.act(obs)

    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    product = torch.empty_like(matrix)

    def matmuls() -> None:
        for _ in range(MATMULS):
            torch.mm(matrix, matrix, out=product)

    functions = {"fit": fit, "updates": updates, "rollout": rollout, "act": act}
    functions["matmuls"] = matmuls
    for name in map(str.strip, sys.stdin):
        functions[name]()
        print(name, flush=True)


if __name__ == "__main__":
    main()
