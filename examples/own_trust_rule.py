"""A trust rule of your own: learn from the transitions on which the members agree most.

Run it in the folder of this file, or with that folder on PYTHONPATH:

    dynajax train --env=cheetah-run --trust=own_trust_rule:Agreement --set trust.share=0.7
"""

import jax.numpy as jnp

import dynajax


@dynajax.fields
class AgreementFields:
    """Settings `trust.*`."""

    share: float = dynajax.traced(0.5, 0, 1, about="share of the transitions that is kept")


class Agreement(dynajax.TrustRule):
    """Keep transitions whose disagreement is below a quantile, averaged over all calls so far."""

    Fields = AgreementFields
    needs_all_members = True  # otherwise only one member predicts each transition

    def init(self):
        """Return the state: the average threshold, and the number of calls."""
        return jnp.zeros(()), jnp.zeros((), jnp.int32)

    def apply(self, state, predictions, h, horizon, key):
        """Return the new state, and which of B transitions to learn from.

        Means are (E, B, D + 1): next state (or its change) and reward, in standard deviations of
        s' - s and of the reward.
        """
        threshold, calls = state
        disagreement = predictions.mean.var(0).sum(-1)
        # Rollouts that have ended are still predicted, and must not count.
        running = jnp.where(predictions.active, disagreement, jnp.nan)
        new = jnp.nanquantile(running, self.config.share)
        new = jnp.where(jnp.isfinite(new), new, threshold)
        threshold = threshold + (new - threshold) / (calls + 1)
        output = dynajax.TrustOutput(keep_mask=disagreement <= threshold)
        return (threshold, calls + 1), output
