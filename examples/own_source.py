"""A source of synthetic data of your own: new one-step rollouts at every agent step.

Run it in the folder of this file, or with that folder on PYTHONPATH:

    dynajax train --env=pendulum-swingup --set rollout.source=own_source:EachStep

Between the two sources of the package: unlike `buffered`, no older transition is used again; unlike
`on_the_fly`, all gradient updates of an agent step share one policy, so their data are made at once.
"""

import jax
import jax.numpy as jnp

import dynajax
from dynajax import replay
from dynajax.synthetic import UpdateInputs


class EachStep(dynajax.Source):
    """Synthetic transitions that are used in one agent step only."""

    @classmethod
    def check(cls, config):
        if config.rollout.horizon != (1,):
            raise dynajax.UsageError(
                "--set rollout.source=own_source:EachStep: it takes one step from each state; "
                "choose --set rollout.horizon=1"
            )

    def start_shape(self):
        """Return the shape of the real states to sample: for each of U updates, B of them."""
        return self.config.learn.utd, self.config.num_parallel_rollouts

    def prepare(self, learner, shared, model_env, real, starts, keys):
        """Return the learner, the U minibatches, and metrics; runs once per agent step."""
        obs = replay.gather(learner.real_buffer, starts).unpack().obs  # (U, B, D)
        # The elites, or all members if the trust rule compares them.
        env = model_env.select_members()
        active = jnp.ones(obs.shape[1], bool)

        def one_update(trust, x):
            obs, key = x
            trust, step = env.step(trust, obs, active, 0, 1, key)
            return trust, replay.pack(step.transition, step.keep_mask, step.weight)

        update_keys = jax.random.split(keys.rollout, len(obs))
        trust, synthetic = jax.lax.scan(one_update, learner.trust, (obs, update_keys))
        metrics = {"valid_fraction": synthetic.valid.mean()}
        return learner._replace(trust=trust), UpdateInputs(real, synthetic), metrics
