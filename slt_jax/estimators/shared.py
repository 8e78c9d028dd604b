"""What estimates that share one setting have in common: its calibration."""

import functools
from typing import Any

from slt_jax.calibration.choose import calibrate
from slt_jax.engine.loop import Engine
from slt_jax.engine.mesh import allgather
from slt_jax.engine.run import check_at_center
from slt_jax.posterior.local import LocalPosterior


def shared_calibration(engine: Engine, posterior: LocalPosterior) -> dict[str, Any]:
    """What is open in the sampler and of the localization, measured at w*; no control variates, no limited steps."""
    total = engine.plan.num_chains * engine.plan.total_steps
    check = functools.partial(check_at_center, engine.problem)
    choice, _ = calibrate(engine, posterior, False, total, check, limits_steps=False)
    return allgather(choice.to_dict(), engine.problem.mesh)[0]
