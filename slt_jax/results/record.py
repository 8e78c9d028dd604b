"""The record of a run: everything it was given, what it took, and where it ran."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, TypedDict


class GradientRecord(TypedDict, total=False):
    """Minibatch gradients spent on each; a forward pass of ``observe`` counts as a third of one."""

    steps: float
    calibration: float
    control: float
    probe: float
    observe: float


class EndRecord(TypedDict, total=False):
    """What was measured when a run had ended; a name is missing where it was not.

    ``noise``, ``noise_stderr``: trace of the covariance of nbeta grad L_m(w). ``acceptance``: Metropolis acceptance of
    one Euler-Maruyama step. ``owed``: what slow directions lack in the estimate (``relaxation.unrelaxed_bias``), and
    ``longer`` how many times as long the run has to be for them. ``gradients``, ``curvature_gradients``: spent.
    ``expected``, ``hidden``, ``hides``, ``quadratic``: by the curvatures at w*, see ``relaxation.Directions``.
    ``stopped_by``: what in the data made chains go non-finite, where that was found.
    """

    noise: float
    noise_stderr: float
    acceptance: float
    owed: float
    longer: float
    expected: float
    hidden: int
    hides: float
    quadratic: float
    gradients: float
    curvature_gradients: float
    stopped_by: str


class CostRecord(TypedDict, total=False):
    """Wall time of the call, and of its ``parts``; steps/s of all chains after the first chunk; peak memory.

    Of a cell of a sweep or a checkpoint of a trajectory, the time is that of its own run.
    """

    seconds: float
    parts: dict[str, float]
    steps_per_s: float | None
    device_peak_mib: int | None
    process_peak_mib: int | None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The settings of one estimate, by the names of ``estimate_llc`` and ``LocalPosterior``, and its circumstances.

    ``num_free``: weights that move. ``sampler``, ``family``, ``metric``: the sampler's name, the name of its theory,
    whether it moved in a metric's coordinates. ``mean_time``: mean length of the draws' steps, as a share of a full
    one. ``interrupted``: the draws that were asked for, where the run was ended before it had them; else 0.
    ``calibration``: as ``calibration.Choice`` writes itself, empty without one. ``probe``: measurements at the
    end. ``memory``: MiB, as they were estimated. ``observed``: of each observable what was kept, and in how many bytes.
    ``effective_dimension``: as ``EffectiveDimension`` writes itself, empty where none was given.
    """

    num_chains: int = 0
    num_draws: int = 0
    num_warmup: int = 0
    thinning: int = 1
    batch_size: int = 0
    micro_batches: int = 1
    baseline: str = "paired"
    chain_batch: int = 1
    control_variate: bool = False
    hot: float = 1.0
    nbeta: float = math.nan
    localization: float = math.nan
    num_data: int = 0
    num_free: int = 0
    chance_loss: float | None = None
    sampler: str = ""
    family: str = ""
    metric: bool = False
    step_size: float = math.nan
    friction: float | None = None
    mean_time: float = 1.0
    interrupted: int = 0
    gradients: GradientRecord = field(default_factory=GradientRecord)
    calibration: dict[str, Any] = field(default_factory=dict)
    probe: EndRecord = field(default_factory=EndRecord)
    devices: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    cost: CostRecord = field(default_factory=CostRecord)
    memory: dict[str, Any] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    effective_dimension: dict[str, Any] = field(default_factory=dict)

    @property
    def spent(self) -> dict[str, float]:
        """Minibatch gradients by what they were spent on."""
        return {name: float(count) for name, count in self.gradients.items() if isinstance(count, int | float)}

    @property
    def gradient_noise(self) -> tuple[float, float]:
        """Trace of the covariance of nbeta grad L_m(w), and its error; none where a batch is the whole data set."""
        if self.batch_size == self.num_data:
            return 0.0, 0.0
        return self.probe.get("noise", math.nan), self.probe.get("noise_stderr", math.nan)

    @property
    def chosen_step(self) -> float:
        """The step size, if a calibration chose it; else NaN."""
        return self.step_size if self.calibration.get("chose_step") else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain values, by name; without ``observed`` and ``effective_dimension`` where there are none."""
        values = dataclasses.asdict(self)
        for name in ("observed", "effective_dimension"):
            if not values[name]:
                del values[name]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunRecord":
        """What ``to_json`` wrote, of this version or an older one, whose missing names get their defaults."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
