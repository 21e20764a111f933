"""What a fit of the model does to one row; `models.fitting` has the fit itself."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dynajax import trust
from dynajax.agents import Agent, make_agent
from dynajax.config import Config
from dynajax.models import fit_data, training
from dynajax.types import HOLDOUT, Array, EnvSpec, LearnerState, Metrics, Params, Shared


@dataclass(frozen=True)
class Refits:
    """The algorithm's fits, bound to a run's static configuration and its task.

    A row carries a configuration of its own, whose traced fields are arrays.
    """

    config: Config
    spec: EnvSpec

    def agent(self, row: LearnerState) -> Agent:
        """The row's agent."""
        return make_agent(row.config, self.spec)

    def _rule(self, row: LearnerState) -> trust.TrustRule:
        return trust.make_rule(row.config, self.spec)

    def _fixes(self) -> list[tuple[str, ...]]:
        return [variant.fixes for variant in self.config.variants]

    def _holdout_key(self, row: LearnerState) -> Array:
        return jax.random.fold_in(row.seed_key, HOLDOUT)

    def _fit_length(self, shared: Shared) -> Array | int:
        return training.length(self.config.model, jnp.minimum(shared.step, self.config.replay.real))

    def fit(self, row: LearnerState, shared: Shared) -> tuple[LearnerState, Metrics]:
        """Refits the row's model to its real transitions."""
        assert row.model is not None
        key, fit_key = jax.random.split(row.key)
        config, holdout_key = row.config.model, self._holdout_key(row)
        model, metrics, data = training.fit(
            config,
            self._fixes(),
            row.variant,
            row.model,
            row.real_buffer,
            holdout_key,
            fit_key,
            self._fit_length(shared),
            self.config.precision,
        )
        return self._calibrated(row._replace(key=key, model=model), data), metrics

    def begin_fit(self, row: LearnerState) -> training.FitInputs:
        """The first part of a `fit` on the fixed schedule, whose members may be trained anywhere."""
        assert row.model is not None
        _, fit_key = jax.random.split(row.key)
        config = row.config.model
        model, data = training.begin(
            config, self._fixes(), row.variant, row.model, row.real_buffer, self._holdout_key(row)
        )
        keys = jax.random.split(fit_key, config.members)
        members = model.params, model.optimiser, keys
        return training.FitInputs(model._replace(params=None, optimiser=None), data, members)

    def train_member(
        self,
        row: LearnerState,
        shared: Shared,
        job: training.FitInputs,
        params: Params,
        adam: Any,
        key: Array,
    ) -> tuple[Params, Any]:
        """The second part, for one of `job.members`: its parameters and Adam's state.

        Args:
          row: only its configuration and its real ring are read.
        """
        config, steps = row.config.model, self._fit_length(shared)
        inputs = config, job.model, params, adam, key, row.real_buffer, job.data, steps
        return training.train_member(*inputs, self.config.precision)

    def end_fit(
        self, row: LearnerState, shared: Shared, job: training.FitInputs, params: Any, adam: Any
    ) -> tuple[LearnerState, Metrics]:
        """The last part, from what was made of all members: the row, and the fit's figures."""
        config = row.config.model
        key, _ = jax.random.split(row.key)
        model = job.model._replace(params=params, optimiser=adam)
        model, metrics = training.end(config, model, job.data, self._fit_length(shared))
        return self._calibrated(row._replace(key=key, model=model), job.data), metrics

    def _calibrated(self, row: LearnerState, data: fit_data.DataSplit) -> LearnerState:
        """The row with its rule of trust adjusted to the model's errors on the holdout."""
        rule, model = self._rule(row), row.model
        if not rule.needs_all_members or model is None:
            return row
        predictions = training.on_holdout(row.config.model, model, data)
        return row._replace(trust=rule.calibrate(row.trust, predictions, data.scored_weights))
